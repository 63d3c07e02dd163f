"""Asking after executions that nobody has closed: what is alive, what is gone, and what cannot be known."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import anyio

from execution_envelope.process import Process
from execution_envelope.record import Record

#: How long an owner may take to answer, in seconds. No answer is *unknown*, never *gone*.
PROBE_TIMEOUT: Final = 10.0
#: How long a lease may go without being renewed, in seconds; ledgers renew theirs every 10 s.
PATIENCE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Liveness:
    """What an owner says of one execution, with what it saw."""

    status: Literal["alive", "gone", "unknown"]
    evidence: str

    @classmethod
    def alive(cls, evidence: str) -> Liveness:
        """It runs."""
        return cls("alive", evidence)

    @classmethod
    def gone(cls, evidence: str) -> Liveness:
        """The owner no longer knows it. It will be recorded as abandoned, with this evidence; or as revoked, where that
        was asked for."""
        return cls("gone", evidence)

    @classmethod
    def unknown(cls, evidence: str) -> Liveness:
        """It cannot be found out now. It keeps what it holds."""
        return cls("unknown", evidence)


class Leases:
    """What is seen of the leases of processes that cannot be looked at from here: of other hosts and containers.

    A process counts up its lease every few seconds. One that did not change for `PATIENCE` seconds of this process's
    own clock has run out: no clock of another host is trusted, nor one that may be set.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def liveness(self, chain: str, renewals: int | None, process: Process | None) -> Liveness:
        """What the lease of a chain says; the first look never says more than *unknown*."""
        who = "the process that admitted it" if process is None else f"its process, {process},"
        if renewals is None:
            return Liveness.unknown(f"{who} ran elsewhere, and has no lease")
        now = self._clock()
        before = self._seen.get(chain)
        if before is None or before[0] != renewals:
            self._seen[chain] = (renewals, now)
            if before is None:
                return Liveness.unknown(f"{who} runs elsewhere; whether it renews its lease is seen the next time")
            return Liveness.alive(f"{who} renews its lease")
        silent = now - before[1]
        if silent < PATIENCE:
            return Liveness.unknown(f"{who} did not renew its lease for {silent:.0f} s")
        return Liveness.gone(f"never bound, and {who} did not renew its lease for {silent:.0f} s")

    def keep(self, chains: Collection[str]) -> None:
        """Forget all others."""
        self._seen = {chain: seen for chain, seen in self._seen.items() if chain in chains}


#: Asks the owner of an execution; may be given any record that names it as owner.
Prober: TypeAlias = Callable[[Record], Awaitable[Liveness]]


@dataclass(slots=True)
class Reconciliation:
    """What one round found: (envelope id, liveness) of those asked after, and how many it was not time to ask."""

    found: list[tuple[str, Liveness]] = field(default_factory=list)
    waiting: int = 0

    def ids(self, status: Literal["alive", "gone", "unknown"]) -> list[str]:
        return [id for id, liveness in self.found if liveness.status == status]


def of_process(process: Process, alive: bool) -> Liveness:
    """An unbound admission lives as long as the process that admitted it."""
    if alive:
        return Liveness.alive(f"its process, {process}, runs")
    return Liveness.gone(f"never bound, and the process that admitted it, {process}, is gone")


async def ask_owner(prober: Prober, record: Record, silent: set[str]) -> Liveness:
    """Ask within `PROBE_TIMEOUT`; an error, nonsense or no answer is unknown. Who does not answer joins `silent`."""
    try:
        with anyio.fail_after(PROBE_TIMEOUT) as scope:
            answer: object = await prober(record)
        if not isinstance(answer, Liveness):
            return Liveness.unknown(f"expected a Liveness of the owner, got `{type(answer).__name__}`")
        return answer
    except TimeoutError as error:
        if not scope.cancelled_caught:
            return Liveness.unknown(f"asking the owner failed: TimeoutError: {error}")
        if record.bound is not None:
            silent.add(record.bound.owner)
        return Liveness.unknown(f"the owner did not answer within {PROBE_TIMEOUT:g} s")
    except Exception as error:
        return Liveness.unknown(f"asking the owner failed: {type(error).__name__}: {error}")

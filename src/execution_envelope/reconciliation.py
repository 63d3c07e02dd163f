"""Asking after executions that nobody has closed: what is alive, what is gone, and what cannot be known."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import anyio

from execution_envelope.process import Process
from execution_envelope.record import Record

#: How long an owner may take to answer, in seconds. No answer is *unknown*, never *gone*.
PROBE_TIMEOUT: Final = 10.0


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
        """The owner no longer knows it. It will be recorded as abandoned, with this evidence."""
        return cls("gone", evidence)

    @classmethod
    def unknown(cls, evidence: str) -> Liveness:
        """It cannot be found out now. It keeps what it holds."""
        return cls("unknown", evidence)


#: Asks the owner of an execution; may be given any record that names it as owner.
Prober: TypeAlias = Callable[[Record], Awaitable[Liveness]]


@dataclass(slots=True)
class Reconciliation:
    """What one round found: (envelope id, liveness) of those asked after, and how many it was not time to ask."""

    found: list[tuple[str, Liveness]] = field(default_factory=list)
    waiting: int = 0

    def ids(self, status: Literal["alive", "gone", "unknown"]) -> list[str]:
        return [id for id, liveness in self.found if liveness.status == status]


def of_process(process: Process | None, alive: bool | None) -> Liveness:
    """An unbound admission lives as long as the process that admitted it."""
    if process is None or alive is None:
        return Liveness.unknown("the process that admitted it ran elsewhere")
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

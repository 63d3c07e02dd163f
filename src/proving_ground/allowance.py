"""How much a move of data may come to: what bounds it, what it is granted, and the pace that keeps it."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from execution_envelope import Admission, Grant
from proving_ground.admission import unkept
from proving_ground.jobs import JobFailed
from proving_ground.sources import CHUNK

#: A slow move reads so often a second, so that it is even and soon cancelled.
_READS: Final = 8


class Pace:
    """A token bucket that holds nothing over: tokens come at `rate` bytes/s while somebody waits for them.

    So of any time between two reads, no more came in it than the rate allows. None is no bound.
    """

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._next = 0.0

    def chunk(self) -> int:
        """How much to read at a time."""
        return CHUNK if self._rate is None else max(1, min(CHUNK, self._rate // _READS))

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may come."""
        if self._rate is not None:
            self._next = max(self._next, time.monotonic()) + size / self._rate
            await asyncio.sleep(self._next - time.monotonic())


@dataclass(frozen=True)
class Bound:
    """The most of one resource, and why it is no more."""

    amount: int
    cause: str
    text: str


def bounds(admission: Admission, left: Mapping[str, Any], room: Bound | None = None) -> dict[str, Bound]:
    """What bounds a move: the ask, limits of policy, budgets, what is left of the run above, and `room` for bytes."""
    found: dict[str, list[Bound]] = {}
    for name, quantity in admission.envelope.requested.resources.items():
        if isinstance(quantity.amount, int):
            found.setdefault(name, []).append(Bound(quantity.amount, "asked", ""))
    for name, limit in admission.limits.items():
        if isinstance(limit, int):
            found.setdefault(name, []).append(Bound(limit, "policy", f"policy allows {limit}"))
    for (account, _, name), entry in admission.record.budgets.items():
        if not entry.shadow and not entry.unknown:
            text = f"{entry.reserved} are reserved of budget {account}"
            found.setdefault(name, []).append(Bound(entry.reserved, "quota", text))
    for name, amount in left.items():
        if isinstance(amount, int):
            text = f"{amount} are left of what the run above was granted"
            found.setdefault(name, []).append(Bound(amount, "quota", text))
    if room is not None:
        found.setdefault("bytes", []).append(room)
    return {name: min(some, key=lambda bound: bound.amount) for name, some in found.items()}


def granted(
    admission: Admission,
    counted: Sequence[str],
    room: Bound | None,
    *,
    honoured: Sequence[str] = (),
    constraints: Mapping[str, Any] | None = None,
    because: Mapping[str, tuple[str, str]] | None = None,
    route: Mapping[str, str],
) -> Callable[[Mapping[str, Any]], Grant]:
    """What is given of what is `counted`, as a function of what is left above; raises `JobFailed` when it is nothing.

    Bytes and rows are given without a bound where nothing bounds them; the rest only where something does.
    """

    def grant(left: Mapping[str, Any]) -> Grant:
        found = bounds(admission, left, room)
        asked = admission.envelope.requested.resources
        given: dict[str, Any] = {}
        said = dict(because or {})
        for name in counted:
            bound = found.get(name)
            if bound is None:
                if name in ("bytes", "rows"):
                    given[name], said[name] = "unlimited", ("default", "nothing bounds it")
                continue
            if bound.amount < 1:
                raise JobFailed("NOTHING_LEFT", f"no {name} may be moved: {bound.text or 'none were asked for'}")
            given[name] = bound.amount
            if name not in asked or (bound.cause not in ("asked", "policy")):
                # The limit of policy on what was asked is a reason of its own on the record.
                said[name] = (bound.cause, bound.text)
        for name in asked:
            if name not in counted:
                said[name] = ("unsupported", f"{name} of this are not counted, so they are not bounded")
                given[name] = 0
        return Grant(
            given,
            basis="enforced",
            route={**route, "pid": str(os.getpid())},
            honoured=honoured,
            constraints=constraints or {},
            because=said,
        )

    return grant


def amounts(admission: Admission) -> dict[str, int | None]:
    """What the grant on the record bounds: resource -> amount in base units, None without a bound."""
    found = admission.record.grants.get("")
    quantities = {} if found is None else found.resources
    return {name: one.amount if isinstance(one.amount, int) else None for name, one in quantities.items()}


def refuse_unkept(admission: Admission, counted: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise `JobFailed` when policy sets a condition that a move cannot keep to."""
    if (said := unkept(admission, (*counted, "concurrency"), given)) is not None:
        raise JobFailed("NOT_ALLOWED", said)
    streams = admission.limits.get("concurrency")
    if isinstance(streams, int) and streams < 1:
        raise JobFailed("NOT_ALLOWED", f"policy allows {streams} at a time; a move is one stream")

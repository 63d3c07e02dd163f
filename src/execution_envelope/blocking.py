"""The seam without an event loop: the same code, run in a loop that lives in a thread meanwhile."""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, Unpack
from weakref import WeakSet

from anyio.from_thread import BlockingPortal, BlockingPortalProvider

from execution_envelope.admission import Admission
from execution_envelope.envelope import Ask, Subject
from execution_envelope.judge import Plan
from execution_envelope.observed import Seen
from execution_envelope.reconciliation import Prober, Reconciliation
from execution_envelope.record import Record
from execution_envelope.reviewer import Carried, Reviewer, ReviewRound, Revokers
from execution_envelope.tree import Tree

T = TypeVar("T")


class Seam(Protocol):
    """What of the controller is offered without an event loop."""

    def admit(self, ask: Ask) -> AbstractAsyncContextManager[Admission]: ...
    async def begin(self, ask: Ask) -> Admission: ...
    async def resume(self, *reference: str, by: str) -> Admission: ...
    async def read(self, *reference: str) -> Record: ...
    async def tree(self, *reference: str) -> Tree: ...
    async def plan(self, ask: Ask) -> Plan: ...
    async def observe(
        self, *reference: str, state: str, rev: int | str, part: str | None, reason: str | None, by: str
    ) -> Record: ...
    async def record(self, ask: Ask, **seen: Unpack[Seen]) -> Record: ...
    async def approve(self, *reference: str, by: Subject, reason: str) -> Record: ...
    async def deny(self, *reference: str, by: Subject, reason: str) -> Record: ...
    async def revoke(self, *reference: str, by: Subject, reason: str) -> Record: ...
    async def review(self, reviewers: Sequence[Reviewer], *, by: str) -> ReviewRound: ...
    async def carry_out(self, revokers: Revokers, *, by: str) -> Carried: ...
    async def reconcile(
        self, probers: Mapping[str, Prober], *, everything: bool = False, by: str = "reconcile"
    ) -> Reconciliation: ...
    async def aclose(self) -> None: ...


class Loop:
    """The event loop of a blocking face: there while a thread needs it, one for all threads that do.

    A forked child has none of its parent's threads, so it begins a loop of its own.
    """

    def __init__(self) -> None:
        self._portals = BlockingPortalProvider()
        _loops.add(self)

    def forget(self) -> None:
        """Leave the present loop to the parent."""
        self._portals = BlockingPortalProvider()

    @contextmanager
    def running(self) -> Iterator[BlockingPortal]:
        """Keep the loop for as long as this lasts. A child that was forked meanwhile leaves without it."""
        portals = self._portals
        portal = portals.__enter__()
        try:
            yield portal
        finally:
            if portals is self._portals:
                portals.__exit__(None, None, None)

    def run(self, function: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        """Call it in the loop. One that is interrupted while it waits, by Ctrl-C, leaves it to its end there."""
        with self.running() as portal:
            return portal.call(partial(function, *arguments, **options))


_loops: WeakSet[Loop] = WeakSet()


def _forked() -> None:
    for loop in _loops:
        loop.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class BlockingController:
    """`AdmissionController` without an event loop: the same code, run in one that lives in a thread meanwhile.

    Safe to share by threads, and by processes that are forked.
    """

    def __init__(self, controller: Seam) -> None:
        self._controller = controller
        self._loop = Loop()

    @contextmanager
    def running(self) -> Iterator[BlockingController]:
        """Keep the loop meanwhile. Calls outside of this and of a block start one each."""
        with self._loop.running():
            yield self

    @contextmanager
    def admit(self, ask: Ask) -> Iterator[BlockingAdmission]:
        """``with controller.blocking().admit(ask) as admission:``, as `AdmissionController.admit`.

        Ctrl-C in the block, or while it is entered, ends what was not bound as cancelled. A child that is forked in the
        block does not end it: it belongs to the parent.
        """
        parent = os.getpid()
        with self._loop.running() as portal:
            block = self._controller.admit(ask)
            admitted = portal.start_task_soon(block.__aenter__)
            try:
                admission = admitted.result()
            except BaseException as error:
                # Refused, or interrupted: then its answer is waited for, which takes no longer than deciders and ledger
                # may take, so that nothing stays admitted that nobody holds.
                if admitted.exception() is None:
                    portal.call(block.__aexit__, type(error), error, error.__traceback__)
                raise
            try:
                yield BlockingAdmission(admission, self._loop)
            except BaseException as error:
                if os.getpid() == parent:
                    portal.call(block.__aexit__, type(error), error, error.__traceback__)
                raise
            if os.getpid() == parent:
                portal.call(block.__aexit__, None, None, None)

    def begin(self, ask: Ask) -> BlockingAdmission:
        """The way into the block, for integrations that call `BlockingAdmission.leave` themselves."""
        return BlockingAdmission(self._loop.run(self._controller.begin, ask), self._loop)

    def resume(self, *reference: str, by: str) -> BlockingAdmission:
        """Continue an execution as yourself, as `AdmissionController.resume`."""
        return BlockingAdmission(self._loop.run(self._controller.resume, *reference, by=by), self._loop)

    def read(self, *reference: str) -> Record:
        """The record with this id or reference, as `AdmissionController.read`."""
        return self._loop.run(self._controller.read, *reference)

    def tree(self, *reference: str) -> Tree:
        """An envelope with all that are part of it, as `AdmissionController.tree`."""
        return self._loop.run(self._controller.tree, *reference)

    def plan(self, ask: Ask) -> Plan:
        """What would happen to a request now, as `AdmissionController.plan`."""
        return self._loop.run(self._controller.plan, ask)

    def observe(
        self, *reference: str, state: str, rev: int | str, part: str | None = None, reason: str | None = None, by: str
    ) -> Record:
        """What the backend says that a part is now, as `AdmissionController.observe`."""
        return self._loop.run(
            self._controller.observe, *reference, state=state, rev=rev, part=part, reason=reason, by=by
        )

    def record(self, ask: Ask, **seen: Unpack[Seen]) -> Record:
        """An execution that is only known afterwards, as `AdmissionController.record`."""
        return self._loop.run(self._controller.record, ask, **seen)

    def approve(self, *reference: str, by: Subject, reason: str) -> Record:
        """Let a held request go on, as `AdmissionController.approve`."""
        return self._loop.run(self._controller.approve, *reference, by=by, reason=reason)

    def deny(self, *reference: str, by: Subject, reason: str) -> Record:
        """Refuse a held request, as `AdmissionController.deny`."""
        return self._loop.run(self._controller.deny, *reference, by=by, reason=reason)

    def reconcile(
        self, probers: Mapping[str, Prober], *, everything: bool = False, by: str = "reconcile"
    ) -> Reconciliation:
        """Look after every open envelope, as `AdmissionController.reconcile`. Probers are async here too."""
        return self._loop.run(self._controller.reconcile, probers, everything=everything, by=by)

    def revoke(self, *reference: str, by: Subject, reason: str) -> Record:
        """Ask the owner of a live execution to take it away, as `AdmissionController.revoke`."""
        return self._loop.run(self._controller.revoke, *reference, by=by, reason=reason)

    def review(self, reviewers: Sequence[Reviewer], *, by: str = "review") -> ReviewRound:
        """Ask reviewers about every live execution, as `AdmissionController.review`."""
        return self._loop.run(self._controller.review, reviewers, by=by)

    def carry_out(self, revokers: Revokers, *, by: str = "revoke") -> Carried:
        """Ask owners to stop what is to be revoked, as `AdmissionController.carry_out`. Revokers are async here too."""
        return self._loop.run(self._controller.carry_out, revokers, by=by)

    def close(self) -> None:
        """Tell observers what they wait for, and let go of the ledger, as `AdmissionController.aclose`."""
        self._loop.run(self._controller.aclose)


class BlockingAdmission:
    """`Admission` without an event loop. Its methods and properties are those of `Admission`, by the same names."""

    def __init__(self, admission: Admission, loop: Loop) -> None:
        self._admission = admission
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._admission, name)
        return partial(self._loop.run, value) if inspect.iscoroutinefunction(value) else value

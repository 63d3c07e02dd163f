"""The seam without an event loop: the same code, run in a loop that lives in a thread meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any, Final, Protocol, Unpack

from anyio.from_thread import BlockingPortalProvider

from execution_envelope.admission import Admission
from execution_envelope.envelope import Ask, Subject
from execution_envelope.judge import Plan
from execution_envelope.observed import Seen
from execution_envelope.record import Record


class Seam(Protocol):
    """What of the controller is offered without an event loop."""

    def admit(self, ask: Ask) -> AbstractAsyncContextManager[Admission]: ...
    async def resume(self, *reference: str, by: str) -> Admission: ...
    async def read(self, *reference: str) -> Record: ...
    async def plan(self, ask: Ask) -> Plan: ...
    async def observe(
        self, *reference: str, state: str, rev: int | str, part: str | None, reason: str | None, by: str
    ) -> Record: ...
    async def record(self, ask: Ask, **seen: Unpack[Seen]) -> Record: ...
    async def approve(self, *reference: str, by: Subject, reason: str) -> Record: ...
    async def deny(self, *reference: str, by: Subject, reason: str) -> Record: ...


class BlockingController:
    """`AdmissionController` without an event loop: the same code, run in one that lives in a thread meanwhile."""

    def __init__(self, controller: Seam) -> None:
        self._controller = controller
        self._portals = BlockingPortalProvider()

    @contextmanager
    def admit(self, ask: Ask) -> Iterator[BlockingAdmission]:
        """``with controller.blocking().admit(ask) as admission:``, as `AdmissionController.admit`."""
        with self._portals as portal, portal.wrap_async_context_manager(self._controller.admit(ask)) as admission:
            yield BlockingAdmission(admission, self._portals)

    def resume(self, *reference: str, by: str) -> BlockingAdmission:
        """Continue an execution as yourself, as `AdmissionController.resume`."""
        with self._portals as portal:
            admission = portal.call(partial(self._controller.resume, *reference, by=by))
        return BlockingAdmission(admission, self._portals)

    def read(self, *reference: str) -> Record:
        """The record with this id or reference, as `AdmissionController.read`."""
        with self._portals as portal:
            return portal.call(self._controller.read, *reference)

    def plan(self, ask: Ask) -> Plan:
        """What would happen to a request now, as `AdmissionController.plan`."""
        with self._portals as portal:
            return portal.call(self._controller.plan, ask)

    def observe(
        self, *reference: str, state: str, rev: int | str, part: str | None = None, reason: str | None = None, by: str
    ) -> Record:
        """What the backend says that a part is now, as `AdmissionController.observe`."""
        call = partial(self._controller.observe, *reference, state=state, rev=rev, part=part, reason=reason, by=by)
        with self._portals as portal:
            return portal.call(call)

    def record(self, ask: Ask, **seen: Unpack[Seen]) -> Record:
        """An execution that is only known afterwards, as `AdmissionController.record`."""
        with self._portals as portal:
            return portal.call(partial(self._controller.record, ask, **seen))

    def approve(self, *reference: str, by: Subject, reason: str) -> Record:
        """Let a held request go on, as `AdmissionController.approve`."""
        with self._portals as portal:
            return portal.call(partial(self._controller.approve, *reference, by=by, reason=reason))

    def deny(self, *reference: str, by: Subject, reason: str) -> Record:
        """Refuse a held request, as `AdmissionController.deny`."""
        with self._portals as portal:
            return portal.call(partial(self._controller.deny, *reference, by=by, reason=reason))


class BlockingAdmission:
    """`Admission` without an event loop. Its facts and properties are those of `Admission`, by the same names."""

    _FACTS: Final = frozenset(
        {
            "effective",
            "attempt",
            "bind",
            "grant",
            "release",
            "ready",
            "observe",
            "used",
            "oblige",
            "reject",
            "complete",
            "fail",
            "cancel",
        }
    )

    def __init__(self, admission: Admission, portals: BlockingPortalProvider) -> None:
        self._admission = admission
        self._portals = portals

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._admission, name)
        if name not in self._FACTS:
            return value

        def record(*arguments: Any, **options: Any) -> None:
            with self._portals as portal:
                portal.call(partial(value, *arguments, **options))

        return record

"""The chain: asks the deciders, within one deadline, and survives whatever they do.

Those on the event loop that are not async answer one after the other; all others at the same time. A decider sees the
sealed envelope and cannot change it. What it answers, or how it failed, is a `Verdict` on the record.

A deadline cannot interrupt what blocks the event loop. Whoever does so for longer than `BLOCKED`, or than it may take
altogether, is named on the record, counted, and quarantined: asked in a thread from then on, or, when it is async, not
asked for `QUARANTINE` seconds, with its failure mode applied.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import anyio
import msgspec

from execution_envelope.answers import Answer, Failure, failed, raised, understood, watched
from execution_envelope.credentials import invalid, shown
from execution_envelope.decision import Decider, Decision, Declaration, Duty, Hook, Observer, Phase
from execution_envelope.envelope import Envelope, canonical
from execution_envelope.errors import InvalidField
from execution_envelope.isolation import Processes
from execution_envelope.lifecycle import Verdict
from execution_envelope.threads import Threads

#: For how long a hook may hold the event loop, in seconds, before it is quarantined, and for how long it then is.
BLOCKED: Final = 0.5
QUARANTINE: Final = 60.0
#: How many threads, and processes, one hook may keep busy; who comes then waits within the deadline.
MAX_THREADS: Final = 8
MAX_PROCESSES: Final = 2

_COUNTED: Final[Mapping[str, str]] = {
    "error": "hooks_failed",
    "invalid": "hooks_failed",
    "timeout": "hooks_timed_out",
    "quarantined": "hooks_quarantined",
}


class Decided(msgspec.Struct):
    """What the deciders said, in their order; the duties that they attached; in a plan, who was left out and why."""

    verdicts: list[Verdict] = []
    duties: dict[str, Sequence[Duty]] = {}
    skipped: dict[str, str] = {}


class HookChain:
    """The hooks in order. Raises `InvalidField` at once for a hook that is declared wrongly.

    `deadline` bounds all deciders of a request together, in seconds. `counters` counts what happened to them.
    """

    def __init__(self, hooks: Sequence[Hook], *, deadline: float, counters: Counter[str] | None = None) -> None:
        # Not `<= 0`, because every comparison with NaN is false.
        if not isinstance(deadline, int | float) or not deadline > 0:
            raise InvalidField("deadline", f"expected more than 0 seconds, got {shown(deadline)}")
        self.hooks = tuple(hooks)
        for hook in self.hooks:
            if not isinstance(hook, Decider | Observer):
                raise invalid("hooks", f"expected `declaration` and `decide` or `observe`, got {shown(hook)}")
            if not isinstance(hook.declaration, Declaration):
                raise invalid("hooks", f"expected a Declaration, got {shown(hook.declaration)}")
            hook.declaration.check()
        names = [hook.declaration.name for hook in self.hooks]
        if len(set(names)) != len(names):
            raise InvalidField("hooks", f"expected hooks with different names, got {', '.join(names)}")
        self._deadline = deadline
        self._counters = Counter[str]() if counters is None else counters
        self._askers = [_Asker(hook, deadline, self._counters) for hook in self.hooks if isinstance(hook, Decider)]
        #: (kind, phase) -> those that cover it.
        self._covering: dict[tuple[str, Phase], list[_Asker]] = {}

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Those that are told of what was recorded."""
        return tuple(hook for hook in self.hooks if isinstance(hook, Observer))

    async def decide(self, envelope: Envelope, *, phase: Phase = "admit", plan: bool = False) -> Decided:
        """Ask every decider that covers the kind. With `plan` those are left out that may have side effects.

        Raises what cancels the caller, and nothing else.
        """
        decided = Decided()
        if not self._askers:
            return decided
        covering = self._covers(envelope.execution.kind, phase)
        if plan:
            decided.skipped = {a.name: why for a in covering if (why := _effects(a.declaration)) is not None}
            covering = [asker for asker in covering if asker.name not in decided.skipped]
        end = time.monotonic() + self._deadline
        answers: list[Answer | None] = [None] * len(covering)
        waiting = []
        for place, asker in enumerate(covering):
            if asker.inline:
                answers[place] = asker.ask_now(envelope, end)
            else:
                waiting.append((place, asker))
        if waiting:
            await _together(waiting, answers, envelope, end)
        for asker, answer in zip(covering, answers, strict=True):
            assert answer is not None
            verdict, duties = answer.verdict, answer.duties
            decided.verdicts.append(verdict)
            if verdict.failure is not None:
                self._counters[_COUNTED[verdict.failure]] += 1
            if duties and not verdict.shadow and verdict.decision in ("allow", "warn", "hold"):
                decided.duties[asker.name] = duties
        return decided

    def _covers(self, kind: str, phase: Phase) -> list[_Asker]:
        found = self._covering.get((kind, phase))
        if found is None:
            found = [asker for asker in self._askers if asker.declaration.covers(kind, phase)]
            self._covering[(kind, phase)] = found
        return found


async def _together(
    waiting: Sequence[tuple[int, _Asker]], answers: list[Answer | None], envelope: Envelope, end: float
) -> None:
    """Ask all of these at the same time, and put what they answer into its place."""

    async def ask(place: int, asker: _Asker) -> None:
        answers[place] = await asker.ask(envelope, end)

    if len(waiting) == 1:
        await ask(*waiting[0])
        return
    try:
        async with anyio.create_task_group() as group:
            for place, asker in waiting:
                group.start_soon(ask, place, asker)
    except BaseExceptionGroup as several:
        # Ctrl-C, which comes in one of them. Who called waits for no group.
        error: BaseException = several
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _effects(declaration: Declaration) -> str | None:
    if declaration.side_effects is False:
        return None
    return "it has side effects" if declaration.side_effects else "it does not say whether it has side effects"


class _Asker:
    """Asks one decider, in the way that it is declared to be asked, and makes a verdict of whatever comes."""

    def __init__(self, hook: Decider, deadline: float, counters: Counter[str]) -> None:
        self.hook = hook
        self.declaration = declared = hook.declaration
        self.name = declared.name
        self._counters = counters
        self._is_async = inspect.iscoroutinefunction(hook.decide)
        #: On the event loop, and not waited for.
        self.inline = declared.inline and not self._is_async
        self._processes = Processes(hook, declared) if declared.isolated else None
        self._threads = Threads(f"hook {self.name}", MAX_PROCESSES if declared.isolated else MAX_THREADS)
        #: For how long it may hold the event loop. What is left of the deadline is not its doing.
        self._hold = min(BLOCKED, deadline, declared.timeout or deadline)
        self._quarantined_until = 0.0

    def ask_now(self, envelope: Envelope, end: float) -> Answer:
        """One that is called on the event loop and answers at once."""
        start, declared = time.monotonic(), self.declaration
        if declared.timeout is not None:
            end = min(end, start + declared.timeout)
        shadow = declared.mode == "shadow" and declared.shadows(envelope)
        if start >= end:
            return self._late((), shadow, start, "the deadline passed before it was asked")
        seen, read = watched(envelope)
        me = os.getpid()
        try:
            said = self.hook.decide(seen)
            if type(said) is not Decision and inspect.isawaitable(said):  # the first costs less to ask
                getattr(said, "close", str)()  # or it warns that it was never awaited
                problem = invalid(f"hooks.{self.name}", "expected `async def decide` of a hook that is waited for")
                answer = failed(declared, "invalid", str(problem), read, shadow=shadow, start=start)
            else:
                answer = understood(declared, said, read, shadow=shadow, start=start)
        except BaseException as error:  # a hook that calls sys.exit must not end the server
            if _is_interrupt(error):
                raise
            answer = failed(declared, "error", raised(error), read, shadow=shadow, start=start)
        if os.getpid() != me:
            _end_a_copy(me)
        now = time.monotonic()
        held = now - start
        if now > end and answer.verdict.failure is None:
            answer = self._late(read, shadow, start)
        if held > self._hold:
            self.inline = False
            answer = self._blocked(answer, held, "it is asked in a thread from now on")
        return answer

    async def ask(self, envelope: Envelope, end: float) -> Answer:
        """One that is waited for."""
        start, declared = time.monotonic(), self.declaration
        if declared.timeout is not None:
            end = min(end, start + declared.timeout)
        shadow = declared.shadows(envelope)
        if start >= end:
            return self._late((), shadow, start, "the deadline passed before it was asked")
        if start < self._quarantined_until:
            why = f"it blocked the event loop, asked again in {self._quarantined_until - start:.0f} s"
            return failed(declared, "quarantined", why, (), shadow=shadow, start=start)
        seen, read = watched(envelope)
        if self._is_async and self._processes is None:
            return await self._waited(_begun(self.hook, seen), read, shadow, start, end)
        try:
            call = self._threads.start(partial(self._called, seen, read, shadow, start, end))
        except RuntimeError as error:  # no more threads
            return failed(declared, "error", raised(error), (), shadow=shadow, start=start)
        with anyio.move_on_after(end - start):
            await call.wait()
        # It may have answered in time while something else kept the event loop from hearing it.
        if call.ended is None or call.ended > end:
            busy = call.began is None or call.began >= end
            return self._late(read, shadow, start, f"all {self._threads.most} were busy" if busy else None)
        said = call.answer()
        return said if isinstance(said, Answer) else await self._waited(said, read, shadow, start, end)

    def _called(
        self, envelope: Envelope, read: Sequence[str], shadow: bool, start: float, end: float
    ) -> Answer | Awaitable[Any]:
        """In a thread: what it answers, or what has to be awaited for that. Raises nothing."""
        declared = self.declaration
        if time.monotonic() >= end:
            return self._late(read, shadow, start)  # it came off the queue while whoever waits gives up
        try:
            if self._processes is not None:
                return self._apart(self._processes.ask(canonical(envelope), end), shadow, start)
            me = os.getpid()
            try:
                said = self.hook.decide(envelope)
            finally:
                _end_a_copy(me)
            if inspect.isawaitable(said):
                return said
            return understood(declared, said, read, shadow=shadow, start=start)
        except BaseException as error:
            if self._processes is None:
                return failed(declared, "error", raised(error), read, shadow=shadow, start=start)
            # Not the hook's, which stay in its process.
            failure: Failure = "timeout" if isinstance(error, TimeoutError) else "error"
            return failed(declared, failure, str(error) or raised(error), (), shadow=shadow, start=start)

    def _apart(self, answer: Answer, shadow: bool, start: float) -> Answer:
        took = round((time.monotonic() - start) * 1_000_000)
        return msgspec.structs.replace(
            answer, verdict=msgspec.structs.replace(answer.verdict, shadow=shadow, duration_us=took)
        )

    async def _waited(
        self, said: Awaitable[Any], read: Sequence[str], shadow: bool, start: float, end: float
    ) -> Answer:
        """What it answers on the event loop, and whether it held that up."""
        declared, before = self.declaration, _cancellations()
        measured = _Measured(said)
        scope = anyio.move_on_after(end - time.monotonic())
        heard: list[Any] = []
        answer: Answer | None = None
        try:
            with scope:
                heard.append(await measured)
        except BaseException as error:
            # Ours, or from around it: when the event loop is closed, for one.
            if not measured.raised or _is_cancellation(error) or _is_interrupt(error):
                raise
            # What it raises because the deadline came is no error of its own.
            failure: Failure = "timeout" if scope.cancel_called else "error"
            answer = failed(declared, failure, raised(error), read, shadow=shadow, start=start)
        if _cancellations() > before:
            # It kept for itself that somebody cancelled the request.
            raise asyncio.CancelledError
        if answer is None:
            in_time = heard and time.monotonic() <= end
            answer = (
                understood(declared, heard[0], read, shadow=shadow, start=start)
                if in_time
                else self._late(read, shadow, start)
            )
        if measured.longest > self._hold:
            self._quarantined_until = time.monotonic() + QUARANTINE
            answer = self._blocked(answer, measured.longest, f"not asked for {QUARANTINE:g} s")
        return answer

    def _late(self, read: Sequence[str], shadow: bool, start: float, why: str | None = None) -> Answer:
        why = why or "no answer before the deadline"
        return failed(self.declaration, "timeout", why, read, shadow=shadow, start=start)

    def _blocked(self, answer: Answer, held: float, then: str) -> Answer:
        self._counters["hooks_blocked"] += 1
        errors = (*answer.verdict.errors, f"it blocked the event loop for {held:.1f} s, {then}")
        return msgspec.structs.replace(answer, verdict=msgspec.structs.replace(answer.verdict, errors=errors))


async def _begun(hook: Decider, envelope: Envelope) -> Any:
    """Even `async def` may be something that raises when it is called."""
    said: Any = hook.decide(envelope)
    return await said


class _Measured:
    """Awaits, and measures each stretch between two pauses: the longest, in seconds; and whether it `raised`."""

    __slots__ = ("_awaitable", "longest", "raised")

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.longest = 0.0
        self.raised = False

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = _awaiting(self._awaitable)
        step, value = inner.send, None
        me = os.getpid()
        while True:
            start = time.monotonic()
            try:
                wanted = step(value)
            except StopIteration as end:
                return end.value
            except BaseException:
                self.raised = True
                raise
            finally:
                _end_a_copy(me)
                self.longest = max(self.longest, time.monotonic() - start)
            try:
                step, value = inner.send, (yield wanted)
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as error:
                step, value = inner.throw, error


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _end_a_copy(me: int) -> None:
    """A copy of the backend that a hook forked ends here, or it would serve its requests a second time."""
    if os.getpid() != me:
        os._exit(0)


def _is_cancellation(error: BaseException) -> bool:
    """Whether somebody cancelled this task, and a hook did not only raise what a cancellation raises.

    With asyncio anybody can raise that by hand, or get it from another task; with trio nobody can.
    """
    return isinstance(error, anyio.get_cancelled_exc_class()) and _cancellations() != 0


def _cancellations() -> int:
    """How many times the task was cancelled and nobody took it back; -1 where that is not counted: in trio a
    cancellation comes again and again until it has its way."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return -1
    return -1 if task is None else task.cancelling()


def _is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C was pressed, and a hook did not only raise what that raises.

    Then what the application does at Ctrl-C is among the frames, unless that is Python's own doing, which leaves none.
    """
    if not isinstance(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        return False
    handler: Any = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        return True
    handler = getattr(handler, "func", handler)
    code = getattr(getattr(handler, "__func__", handler), "__code__", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace = trace.tb_next
    return False

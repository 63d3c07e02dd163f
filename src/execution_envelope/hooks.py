"""The chain: asks the deciders, within one deadline, and survives whatever they do.

Those on the event loop that are not async answer one after the other; all others at the same time. A decider sees the
sealed envelope and cannot change it. What it answers, or how it failed, is a `Verdict` on the record.

A deadline cannot interrupt what blocks the event loop. Whoever does so for longer than `BLOCKED` is named on the
record, counted, and quarantined: asked in a thread from then on, or, when it is async, not asked for `QUARANTINE`
seconds, with its failure mode applied.
"""

from __future__ import annotations

import asyncio
import inspect
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

import anyio
import anyio.to_process
import msgspec
from anyio.lowlevel import RunVar

from execution_envelope.credentials import brief, invalid, scrub, shown
from execution_envelope.decision import (
    CODES,
    OUTCOMES,
    Decider,
    Decision,
    Declaration,
    Duty,
    Hook,
    Observer,
    Phase,
)
from execution_envelope.envelope import Envelope, Scope, bounded, canonical, decode
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import Verdict
from execution_envelope.resources import VOCABULARY, Amount, parse_amount
from execution_envelope.threads import Busy, Threads

#: For how long a hook may hold the event loop, in seconds, before it is quarantined, and for how long it then is.
BLOCKED: Final = 0.5
QUARANTINE: Final = 60.0
#: How many threads, and processes, one hook may keep busy; who comes then waits within the deadline.
MAX_THREADS: Final = 8
MAX_PROCESSES: Final = 2
#: How many obligations, policies, errors, hints and limits one decision may name.
MAX_SAID: Final = 64
#: The raw answer of an engine elsewhere is cut at so many characters.
MAX_ANSWER: Final = 4096

Failure: TypeAlias = Literal["error", "timeout", "invalid", "quarantined"]


@dataclass(slots=True)
class Decided:
    """What the deciders said, in their order; the duties that they attached; in a plan, who was left out and why."""

    verdicts: list[Verdict] = field(default_factory=list)
    duties: dict[str, Sequence[Duty]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class HookChain:
    """The hooks in order. Raises `InvalidField` at once for a hook that is declared wrongly.

    `deadline` bounds all deciders of a request together, in seconds. `counters` counts what happened to them.
    """

    def __init__(self, hooks: Sequence[Hook], *, deadline: float, counters: Counter[str] | None = None) -> None:
        # Not `<= 0`, because every comparison with NaN is false.
        if not isinstance(deadline, int | float) or not deadline > 0:
            raise InvalidField("deadline", f"expected more than 0 seconds, got {shown(deadline)}")
        for hook in hooks:
            if not isinstance(hook, Decider | Observer):
                raise invalid("hooks", f"expected `declaration` and `decide` or `observe`, got {shown(hook)}")
            if not isinstance(hook.declaration, Declaration):
                raise invalid("hooks", f"expected a Declaration, got {shown(hook.declaration)}")
            hook.declaration.check()
        names = [hook.declaration.name for hook in hooks]
        if len(set(names)) != len(names):
            raise InvalidField("hooks", f"expected hooks with different names, got {', '.join(names)}")
        self.hooks = tuple(hooks)
        self._deadline = deadline
        self._counters = Counter[str]() if counters is None else counters
        self._askers = [_Asker(hook, self._counters) for hook in hooks if isinstance(hook, Decider)]
        #: (kind, phase) -> those that cover it, and those of them that are waited for together.
        self._covering: dict[tuple[str, Phase], list[_Asker]] = {}

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Those that are told of what was recorded."""
        return tuple(hook for hook in self.hooks if isinstance(hook, Observer))

    async def decide(self, envelope: Envelope, *, phase: Phase = "admit", plan: bool = False) -> Decided:
        """Ask every decider that covers the kind. With `plan` those are left out that may have side effects."""
        decided = Decided()
        if not self._askers:
            return decided
        covering = self._covers(envelope.execution.kind, phase)
        if plan:
            decided.skipped = {a.name: why for a in covering if (why := _effects(a.declaration)) is not None}
            covering = [asker for asker in covering if asker.name not in decided.skipped]
        end = time.monotonic() + self._deadline
        answers: list[_Answer | None] = [None] * len(covering)
        waiting = []
        for place, asker in enumerate(covering):
            if asker.inline:
                answers[place] = asker.ask_now(envelope, end)
            else:
                waiting.append((place, asker))
        if len(waiting) == 1:
            [(place, asker)] = waiting
            answers[place] = await asker.ask(envelope, end)
        elif waiting:

            async def ask(place: int, asker: _Asker) -> None:
                answers[place] = await asker.ask(envelope, end)

            async with anyio.create_task_group() as group:
                for place, asker in waiting:
                    group.start_soon(ask, place, asker)
        for asker, answer in zip(covering, answers, strict=True):
            assert answer is not None
            verdict, duties = answer
            decided.verdicts.append(verdict)
            if duties and not verdict.shadow and verdict.decision in ("allow", "warn", "hold"):
                decided.duties[asker.name] = duties
        return decided

    def _covers(self, kind: str, phase: Phase) -> list[_Asker]:
        found = self._covering.get((kind, phase))
        if found is None:
            found = [asker for asker in self._askers if asker.declaration.covers(kind, phase)]
            self._covering[(kind, phase)] = found
        return found


_Answer: TypeAlias = tuple[Verdict, Sequence[Duty]]


def _effects(declaration: Declaration) -> str | None:
    if declaration.side_effects is False:
        return None
    return "it has side effects" if declaration.side_effects else "it does not say whether it has side effects"


class _Asker:
    """Asks one decider, in the way that it is declared to be asked, and makes a verdict of whatever comes."""

    def __init__(self, hook: Decider, counters: Counter[str]) -> None:
        self.hook = hook
        self.declaration = hook.declaration
        self.name = hook.declaration.name
        self._counters = counters
        self._is_async = inspect.iscoroutinefunction(hook.decide)
        #: On the event loop, and not waited for.
        self.inline = self.declaration.inline and not self._is_async
        self._threads = Threads(f"hook {self.name}", MAX_THREADS)
        self._quarantined_until = 0.0

    def ask_now(self, envelope: Envelope, end: float) -> _Answer:
        """One that is called on the event loop and answers at once."""
        start = time.monotonic()
        if start >= end:
            return self._failed(envelope, "timeout", "the deadline passed before it was asked", 0)
        watched, read = _watched(envelope)
        try:
            answer = self.hook.decide(watched)
            if inspect.isawaitable(answer):
                _discard(answer)
                raise invalid(f"hooks.{self.name}", "expected `async def decide` of a hook that is waited for")
            heard = self._verdict(envelope, answer, start, read)
        except KeyboardInterrupt:
            raise
        except InvalidField as error:
            heard = self._failed(envelope, "invalid", str(error), _since(start))
        except BaseException as error:  # a hook that calls sys.exit must not end the server
            heard = self._failed(envelope, "error", f"{type(error).__name__}: {error}", _since(start))
        held = time.monotonic() - start
        if held > BLOCKED or start + held > end:
            self.inline = False  # from now on in a thread
            heard = self._blocked(envelope, heard, held, start + held > end, "it is asked in a thread from now on")
        return heard

    async def ask(self, envelope: Envelope, end: float) -> _Answer:
        """One that is waited for."""
        start = time.monotonic()
        if self.declaration.timeout is not None:
            end = min(end, start + self.declaration.timeout)
        if start >= end:
            return self._failed(envelope, "timeout", "the deadline passed before it was asked", 0)
        if start < self._quarantined_until:
            left = self._quarantined_until - start
            return self._failed(envelope, "quarantined", f"it blocked the event loop, asked again in {left:.0f} s", 0)
        watched, read = _watched(envelope)
        measure = _Measure()
        scope = anyio.move_on_after(end - start)
        try:
            with scope:
                heard = self._verdict(envelope, await self._answer(watched, measure, end), start, read)
            if scope.cancelled_caught:
                heard = self._failed(envelope, "timeout", "no answer before the deadline", _since(start))
        except KeyboardInterrupt:
            raise
        except InvalidField as error:
            heard = self._failed(envelope, "invalid", str(error), _since(start))
        except Busy as busy:
            heard = self._failed(envelope, "timeout", str(busy), _since(start))
        except BaseException as error:  # a hook that calls sys.exit must not end the server
            if isinstance(error, anyio.get_cancelled_exc_class()) and _is_cancelled():
                raise
            # What it raises because the deadline came is no error of its own.
            failure: Failure = "timeout" if scope.cancel_called else "error"
            heard = self._failed(envelope, failure, f"{type(error).__name__}: {error}", _since(start))
        if measure.longest > BLOCKED:
            self._quarantined_until = time.monotonic() + QUARANTINE
            late = time.monotonic() > end
            heard = self._blocked(envelope, heard, measure.longest, late, f"not asked for {QUARANTINE:g} s")
        elif time.monotonic() > end and heard[0].failure is None:
            heard = self._failed(envelope, "timeout", "it blocked the event loop past the deadline", _since(start))
        return heard

    async def _answer(self, envelope: Envelope, measure: _Measure, end: float) -> Any:
        if self.declaration.isolated:
            body = canonical(envelope)
            return await anyio.to_process.run_sync(
                _isolated, self.hook, body, self.declaration.memory, cancellable=True, limiter=_processes(self.name)
            )
        if self._is_async:
            answer = self.hook.decide(envelope)
            return await _Measured(answer, measure) if inspect.isawaitable(answer) else answer
        answer = await self._threads.call(lambda: self.hook.decide(envelope), end)
        return await _Measured(answer, measure) if inspect.isawaitable(answer) else answer

    def _blocked(self, envelope: Envelope, heard: _Answer, held: float, late: bool, then: str) -> _Answer:
        self._counters["hooks_blocked"] += 1
        said = f"it blocked the event loop for {held:.1f} s, {then}"
        verdict, duties = heard
        if late and verdict.failure is None:
            return self._failed(envelope, "timeout", f"no answer before the deadline: {said}", verdict.duration_us)
        return msgspec.structs.replace(verdict, errors=(*verdict.errors, said)), duties

    def _verdict(self, envelope: Envelope, decision: Any, start: float, read: Sequence[str]) -> _Answer:
        declared, path = self.declaration, f"hooks.{self.name}"
        if not isinstance(decision, Decision) or decision.outcome not in OUTCOMES:
            raise invalid(path, f"expected a Decision, got `{type(decision).__name__}`")
        code, outcome = decision.code, decision.outcome
        if (outcome in ("deny", "hold") or code is not None) and code not in CODES:
            raise invalid(f"{path}.code", f"expected one of {', '.join(CODES)}, got {shown(code)}")
        limits, allowed = _limits(decision.limits, path) if decision.limits else (_NO_LIMITS, _NO_VALUES)
        verdict = Verdict(
            hook=declared.name,
            version=declared.version,
            decision=outcome,
            code=code,
            message=None if decision.message is None else scrub(decision.message, field=f"{path}.message"),
            retryable=outcome == "deny" and CODES[code or ""][0],
            duration_us=_since(start),
            limits=limits,
            allowed=allowed,
            shadow=declared.shadows(envelope),
            revision=None if decision.revision is None else scrub(decision.revision, field=f"{path}.revision"),
            policies=_texts(decision.policies, f"{path}.policies"),
            errors=_texts(decision.errors, f"{path}.errors"),
            hints=_texts(list(read) if decision.hints is None else decision.hints, f"{path}.hints"),
            answer=None if decision.answer is None else scrub(decision.answer[:MAX_ANSWER], field=f"{path}.answer"),
        )
        return verdict, _duties(decision.obligations, path) if decision.obligations else ()

    def _failed(self, envelope: Envelope, failure: Failure, message: str, duration_us: int) -> _Answer:
        self._counters[f"hooks_{_COUNTED[failure]}"] += 1
        declared, mode = self.declaration, self.declaration.failure_mode
        verdict = Verdict(
            hook=declared.name,
            version=declared.version,
            decision=mode,
            code=None if mode == "allow" else _CODE_OF[failure],
            message=scrub(message),
            retryable=mode == "deny",
            duration_us=duration_us,
            failure=failure,
            failure_mode=mode,
            shadow=declared.shadows(envelope),
        )
        return verdict, ()


_NO_LIMITS: Final[Mapping[str, Amount]] = {}
_NO_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {}
_CODE_OF: Final[Mapping[Failure, str]] = {
    "error": "hook_error",
    "invalid": "hook_error",
    "timeout": "hook_timeout",
    "quarantined": "hook_quarantined",
}
_COUNTED: Final[Mapping[Failure, str]] = {
    "error": "failed",
    "invalid": "failed",
    "timeout": "timed_out",
    "quarantined": "quarantined",
}


def _limits(said: Any, path: str) -> tuple[Mapping[str, Amount], Mapping[str, tuple[Any, ...]]]:
    if not isinstance(said, Mapping) or len(said) > MAX_SAID:
        raise invalid(f"{path}.limits", f"expected a mapping of up to {MAX_SAID} limits, got {shown(said)}")
    limits: dict[str, Amount] = {}
    allowed: dict[str, tuple[Any, ...]] = {}
    for name, value in said.items():
        field_name = f"{path}.limits.{brief(str(name))}"
        if name in VOCABULARY or not isinstance(value, list | tuple):
            limits[name] = parse_amount(name, value, field=field_name)
        else:
            allowed[str(name)] = tuple(bounded(item, field_name) for item in value[:MAX_SAID])
    return limits, allowed


def _texts(said: Sequence[str], path: str) -> tuple[str, ...]:
    if not said:
        return ()
    if not isinstance(said, list | tuple | frozenset | set):
        raise invalid(path, f"expected a list of texts, got {shown(said)}")
    some = [scrub(text, field=path) for text in list(said)[:MAX_SAID]]
    return (*some, f"and {len(said) - MAX_SAID} more") if len(said) > MAX_SAID else tuple(some)


def _duties(said: Any, path: str) -> tuple[Duty, ...]:
    if not isinstance(said, list | tuple) or len(said) > MAX_SAID or not all(isinstance(duty, Duty) for duty in said):
        raise invalid(f"{path}.obligations", f"expected up to {MAX_SAID} duties, got {shown(said)}")
    names = [duty.name for duty in said]
    if len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise invalid(f"{path}.obligations", f"expected duties with different names, got {shown(names)}")
    return tuple(
        Duty(
            scrub(duty.name, field=f"{path}.obligations"),
            None if duty.text is None else scrub(duty.text, field=f"{path}.obligations"),
            bool(duty.required),
        )
        for duty in said
    )


class _Hints(dict[str, Any]):
    """Governance hints, and which of them were read."""

    __slots__ = ("read",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self.read[name] = None
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read[name] = None
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str):
            self.read[name] = None
        return super().__contains__(name)

    def items(self) -> Any:
        self.read.update(dict.fromkeys(super().keys()))
        return super().items()

    def values(self) -> Any:
        self.read.update(dict.fromkeys(super().keys()))
        return super().values()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the sealed part of an envelope does not change")

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse


class _Read(Sequence[str]):
    """The hints that were read and are there."""

    def __init__(self, hints: _Hints) -> None:
        self._hints = hints

    def _names(self) -> list[str]:
        return [name for name in self._hints.read if dict.__contains__(self._hints, name)]

    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]

    def __len__(self) -> int:
        return len(self._names())


def _watched(envelope: Envelope) -> tuple[Envelope, Sequence[str]]:
    """The envelope, with hints that tell who reads them. Most have none."""
    if not envelope.scope.hints:
        return envelope, ()
    hints = _Hints(envelope.scope.hints)
    scope: Scope = msgspec.structs.replace(envelope.scope, hints=hints)
    return msgspec.structs.replace(envelope, scope=scope), _Read(hints)


class _Measure:
    """The longest time for which the event loop was held."""

    __slots__ = ("longest",)

    def __init__(self) -> None:
        self.longest = 0.0


class _Measured:
    """Awaits, and measures each stretch between two pauses."""

    def __init__(self, awaitable: Awaitable[Any], measure: _Measure) -> None:
        self._awaitable = awaitable
        self._measure = measure

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self._awaitable.__await__()
        step, value = inner.send, None
        while True:
            start = time.monotonic()
            try:
                wanted = step(value)
            except StopIteration as end:
                return end.value
            finally:
                self._measure.longest = max(self._measure.longest, time.monotonic() - start)
            try:
                step, value = inner.send, (yield wanted)
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as error:
                step, value = inner.throw, error


def _isolated(hook: Decider, body: bytes, memory: int) -> Any:
    """In a process of its own: decide with so much memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard < 0 else min(memory, hard), hard))
    envelope, read = _watched(decode(body))
    answer: Any = hook.decide(envelope)
    if inspect.isawaitable(answer):

        async def wait() -> Any:
            return await answer

        answer = anyio.run(wait)
    if isinstance(answer, Decision) and answer.hints is None and len(read):
        answer = replace(answer, hints=list(read))
    return answer


_process_limits: RunVar[dict[str, anyio.CapacityLimiter]] = RunVar("execution_envelope.hook_processes")


def _processes(name: str) -> anyio.CapacityLimiter:
    try:
        limits = _process_limits.get()
    except LookupError:
        limits = {}
        _process_limits.set(limits)
    if name not in limits:
        limits[name] = anyio.CapacityLimiter(MAX_PROCESSES)
    return limits[name]


def _discard(answer: Any) -> None:
    close = getattr(answer, "close", None)
    if close is not None:
        close()


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task, now that the exception of a cancellation was raised in it.

    With asyncio anybody can raise that by hand, or get it from another task; with trio nobody can.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0


def _since(start: float) -> int:
    return round((time.monotonic() - start) * 1_000_000)

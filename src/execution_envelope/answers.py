"""What a decider answered, as the verdict that is recorded: checked, bounded, without credentials.

Whatever it answered, there is a verdict: one that cannot be understood is a failure, with the failure mode applied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, KeysView, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final, Literal, TypeAlias, cast

import msgspec

from execution_envelope.credentials import brief, invalid, scrub, shown
from execution_envelope.decision import CODES, OUTCOMES, Decision, Declaration, Duty
from execution_envelope.envelope import Envelope, Scope, bounded, canonical
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import Verdict
from execution_envelope.resources import VOCABULARY, Amount, parse_amount

#: How many obligations, policies, errors, hints and limits one decision may name.
MAX_SAID: Final = 64
#: The raw answer of an engine elsewhere is cut at so many characters.
MAX_ANSWER: Final = 4096
#: The values that one decision allows for constraints have so many bytes together.
MAX_ALLOWED: Final = 64 * 1024

Failure: TypeAlias = Literal["error", "timeout", "invalid", "quarantined"]

_NO_LIMITS: Final[Mapping[str, Amount]] = {}
_NO_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {}
_CODE_OF: Final[Mapping[Failure, str]] = {
    "error": "hook_error",
    "invalid": "hook_error",
    "timeout": "hook_timeout",
    "quarantined": "hook_quarantined",
}


class Answer(msgspec.Struct, frozen=True):
    """The verdict, and the duties that it attaches. As JSON it comes from the process of an isolated hook."""

    verdict: Verdict
    duties: tuple[Duty, ...] = ()


def understood(declared: Declaration, said: Any, read: Sequence[str], *, shadow: bool, start: float) -> Answer:
    """What was `said`, by a hook that began at `start` of the monotonic clock and read these hints."""
    try:
        return _understood(declared, said, read, shadow, start)
    except InvalidField as error:
        problem = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what was said may do anything when it is looked at
        problem = raised(error)
    return failed(declared, "invalid", problem, read, shadow=shadow, start=start)


def failed(
    declared: Declaration, failure: Failure, message: str, read: Sequence[str], *, shadow: bool, start: float
) -> Answer:
    """That it failed, and the failure mode that is applied."""
    mode = declared.failure_mode
    verdict = Verdict(
        hook=declared.name,
        version=declared.version,
        decision=mode,
        code=None if mode == "allow" else _CODE_OF[failure],
        message=scrub(message),
        retryable=mode == "deny",
        duration_us=_since(start),
        failure=failure,
        failure_mode=mode,
        shadow=shadow,
        hints=tuple(islice(read, MAX_SAID)),
    )
    return Answer(verdict)


def raised(error: BaseException) -> str:
    """An exception as a message, also one that cannot be shown."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


def _understood(declared: Declaration, said: Any, read: Sequence[str], shadow: bool, start: float) -> Answer:
    path = f"hooks.{declared.name}"
    if type(said) is Decision and _says_yes(said, read):
        revision = None if said.revision is None else _scrubbed(said.revision, path, "revision")
        verdict = Verdict(
            declared.name,
            declared.version,
            said.outcome,
            duration_us=_since(start),
            shadow=shadow,
            revision=revision,
        )
        return Answer(verdict)
    if not isinstance(said, Decision):
        raise invalid(path, f"expected a Decision, got `{type(said).__name__}`")
    outcome, code = said.outcome, said.code
    if type(outcome) is not str or outcome not in OUTCOMES:
        raise invalid(path, f"expected {', '.join(OUTCOMES)}, got {shown(outcome)}")
    if code is None and outcome not in ("deny", "hold"):
        retryable = False
    elif type(code) is str and code in CODES:
        retryable = outcome == "deny" and CODES[code][0]
    else:
        raise invalid(f"{path}.code", f"expected one of {', '.join(CODES)}, got {shown(code)}")
    limits, allowed = _limits(said.limits, path) if said.limits else (_NO_LIMITS, _NO_VALUES)
    verdict = Verdict(
        hook=declared.name,
        version=declared.version,
        decision=outcome,
        code=code,
        message=None if said.message is None else _scrubbed(said.message, path, "message"),
        retryable=retryable,
        duration_us=_since(start),
        limits=limits,
        allowed=allowed,
        shadow=shadow,
        revision=None if said.revision is None else _scrubbed(said.revision, path, "revision"),
        policies=_texts(said.policies, path, "policies") if said.policies else (),
        errors=_texts(said.errors, path, "errors") if said.errors else (),
        # Their names were sealed, and are fit for the record.
        hints=tuple(islice(read, MAX_SAID)) if said.hints is None else _texts(said.hints, path, "hints"),
        answer=None if said.answer is None else _raw(said.answer, f"{path}.answer"),
    )
    return Answer(verdict, _duties(said.obligations, path) if said.obligations else ())


def _says_yes(said: Decision, read: Sequence[str]) -> bool:
    """The usual answer, in which nothing else has to be looked at."""
    return (
        said.outcome == "allow"
        and said.code is None
        and said.message is None
        and said.answer is None
        and not (said.limits or said.obligations or said.policies or said.errors)
        and (said.hints == () or (said.hints is None and not read))
    )


def _scrubbed(text: Any, path: str, name: str) -> str:
    """The same few texts come again and again."""
    try:
        return _ordinary(text)
    except (TypeError, ValueError):
        return scrub(text, field=f"{path}.{name}")


# Of a text from which something has to be taken out nothing is remembered.
@lru_cache(maxsize=1024)
def _ordinary(text: Any) -> str:
    if type(text) is not str or len(text) > 128 or scrub(text) != text:
        raise ValueError("expected ordinary text")
    return text


def _since(start: float) -> int:
    return round((time.monotonic() - start) * 1_000_000)


def _limits(said: Any, path: str) -> tuple[Mapping[str, Amount], Mapping[str, tuple[Any, ...]]]:
    if not isinstance(said, Mapping) or len(said) > MAX_SAID:
        raise invalid(f"{path}.limits", f"expected a mapping of up to {MAX_SAID} limits, got {shown(said)}")
    limits: dict[str, Amount] = {}
    allowed: dict[str, tuple[Any, ...]] = {}
    # Some say that they are short and never end.
    for name, value in islice(said.items(), MAX_SAID):
        if type(name) is not str or not name:
            raise invalid(f"{path}.limits", f"expected the name of a resource or a constraint, got {shown(name)}")
        at = f"{path}.limits.{brief(name)}"
        if name in VOCABULARY:
            limits[name] = parse_amount(name, value, field=at)
        elif isinstance(value, list | tuple):
            if len(value) > MAX_SAID:
                raise invalid(at, f"expected up to {MAX_SAID} values, got {len(value)}")
            allowed[scrub(name, field=at)] = tuple(bounded(item, at) for item in value)
        elif isinstance(value, str | bool):
            allowed[scrub(name, field=at)] = (bounded(value, at),)
        else:
            limits[name] = parse_amount(name, value, field=at)  # says which names there are
    if allowed and (size := len(canonical(allowed))) > MAX_ALLOWED:
        raise invalid(f"{path}.limits", f"expected values of up to {MAX_ALLOWED} bytes, got {size}")
    return limits, allowed


def _texts(said: Any, path: str, name: str) -> tuple[str, ...]:
    if not isinstance(said, list | tuple | frozenset | set):
        raise invalid(f"{path}.{name}", f"expected a list of texts, got {shown(said)}")
    some = [_scrubbed(text, path, name) for text in islice(said, MAX_SAID)]
    if isinstance(said, frozenset | set):
        some.sort()
    return (*some, f"and {len(said) - MAX_SAID} more") if len(said) > MAX_SAID else tuple(some)


def _raw(said: Any, path: str) -> str:
    if type(said) is not str:
        raise invalid(path, f"expected text, got `{type(said).__name__}`")
    return scrub(said, MAX_ANSWER, field=path)


def _duties(said: Any, path: str) -> tuple[Duty, ...]:
    path = f"{path}.obligations"
    if not isinstance(said, list | tuple) or len(said) > MAX_SAID or not all(isinstance(duty, Duty) for duty in said):
        raise invalid(path, f"expected up to {MAX_SAID} duties, got {shown(said)}")
    duties = tuple(
        Duty(
            scrub(duty.name, field=path),
            None if duty.text is None else scrub(duty.text, field=path),
            bool(duty.required),
        )
        for duty in said
    )
    if len({duty.name for duty in duties}) < len(duties) or not all(duty.name for duty in duties):
        raise invalid(path, "expected duties with different names")
    return duties


# Which hints it read


class _Hints(dict[str, Any]):
    """Governance hints, and which of them were read. Whoever goes through all of them has read them all."""

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

    def _all(self) -> None:
        self.read.update(dict.fromkeys(super().keys()))

    # With an `__iter__` of its own, `dict(hints)` and `**hints` come this way too.
    def __iter__(self) -> Iterator[str]:
        self._all()
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        self._all()
        return super().keys()

    def items(self) -> Any:
        self._all()
        return super().items()

    def values(self) -> Any:
        self._all()
        return super().values()

    def copy(self) -> dict[str, Any]:
        self._all()
        return dict(super().items())

    def __eq__(self, other: object) -> bool:
        self._all()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    __hash__ = None

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the sealed part of an envelope does not change; record an event instead")

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse


class _Read(Sequence[str]):
    """The hints that were read so far and are there."""

    def __init__(self, hints: _Hints) -> None:
        self._hints = hints

    def _names(self) -> tuple[str, ...]:
        # A hook that was given up may go on reading in its thread: a copy is made in one step.
        return tuple(name for name in tuple(self._hints.read) if dict.__contains__(self._hints, name))

    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]

    def __len__(self) -> int:
        return len(self._names())


def watched(envelope: Envelope) -> tuple[Envelope, Sequence[str]]:
    """The envelope, with hints that tell who reads them, and those that were read so far. Most have none."""
    if not envelope.scope.hints:
        return envelope, ()
    hints = _Hints(envelope.scope.hints)
    scope: Scope = msgspec.structs.replace(envelope.scope, hints=hints)
    return msgspec.structs.replace(envelope, scope=scope), cast(Sequence[str], _Read(hints))

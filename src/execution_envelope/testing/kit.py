"""A clock that stands still, an ask, and a ledger that fails on purpose."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from execution_envelope.envelope import Ask, Subject, Target
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import Ledger, MemoryLedger

#: When `FakeClock` starts.
START = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


class FakeClock:
    """A clock that stands still until it is told: ``AdmissionController(ledger, clock=FakeClock())``."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **amount: float) -> None:
        """Move on by what `timedelta` takes: ``advance(minutes=5)``."""
        self.now += timedelta(**amount)


def ask(**overrides: Any) -> Ask:
    """An ask to deploy a small model; any field of `Ask` may be given in place of its own."""
    default = Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        target=Target("model", "smollm2-135m", "q4"),
        subject=Subject("user", "dana", tenant="acme", roles=("operator",)),
        scope={"project": "research", "environment": "test"},
        requested={"gpu": 1, "memory": "2GiB"},
        constraints={"engine": "llama.cpp"},
        entrypoint="POST /serving/deploy_model",
    )
    return replace(default, **overrides)


if TYPE_CHECKING:
    # It answers to every method of a ledger, but type checkers do not see what `__getattr__` answers to.
    _Delegating = MemoryLedger
else:
    _Delegating = object


class FaultyLedger(_Delegating):
    """A ledger whose `fail_at`-th call, counted from 1, raises `LedgerUnavailable`; it works again afterwards.

    With `after` the call takes effect first and only its answer is lost, as when a connection breaks in a COMMIT; of a
    submission that somebody waits for, that is what it is told. With `hang` the call does not fail but takes so many
    seconds longer, before it takes effect or `after`; a submission is not begun, or not told, for so long.
    `calls` counts what was called so far; `fail_at` None fails nothing.
    """

    def __init__(
        self, ledger: Ledger, fail_at: int | None = None, *, after: bool = False, hang: float | None = None
    ) -> None:
        self.inline = ledger.inline
        self.fail_at = fail_at
        self.calls = 0
        self._ledger = ledger
        self._after = after
        self._hang = hang
        self._late: list[threading.Thread] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls != self.fail_at:
                return method(*arguments, **options)
            if self._hang is not None:
                return self._hanging(method, self._hang, *arguments, **options)
            if not self._after:
                raise LedgerUnavailable(f"call {self.calls} was made to fail")
            lost = LedgerUnavailable(f"the answer to call {self.calls} was made to be lost")
            if name == "submit" and arguments[0].window is None:
                tell = arguments[0].told
                arguments[0].told = lambda outcome: tell(lost)
                return method(*arguments, **options)
            method(*arguments, **options)
            raise lost

        return call

    def _hanging(self, method: Callable[..., Any], seconds: float, *arguments: Any, **options: Any) -> Any:
        if method.__name__ == "submit":
            if self._after:
                tell = arguments[0].told
                arguments[0].told = lambda outcome: self._later(seconds, tell, outcome)
                return method(*arguments, **options)
            return self._later(seconds, method, *arguments, **options)
        if not self._after:
            time.sleep(seconds)
        answer = method(*arguments, **options)
        if self._after:
            time.sleep(seconds)
        return answer

    def _later(self, seconds: float, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        timer = threading.Timer(seconds, call, arguments, options)
        timer.daemon = True
        self._late.append(timer)
        timer.start()

    def close(self) -> None:
        """Let go of the wrapped ledger, when what hangs has come to its end; never fails on purpose."""
        while self._late:
            self._late.pop().join()
        self._ledger.close()

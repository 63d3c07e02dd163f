"""A policy in a file that is reloaded without a restart: all of it, or, when it is broken, nothing of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from execution_envelope.credentials import brief, invalid
from execution_envelope.decision import Decision, Declaration
from execution_envelope.envelope import Envelope
from execution_envelope.errors import InvalidField

#: How often a file that is watched is looked at, in seconds.
WATCHED: Final = 1.0
#: No policy is longer, whatever its language.
MAX_BYTES: Final = 262_144
#: How deep brackets may stand in each other. Parsers that recurse would end the process, not raise.
MAX_DEPTH: Final = 100

_logger = logging.getLogger(__name__)


class Judging(Protocol):
    """What a file is read as: something that decides, and has a revision."""

    @property
    def revision(self) -> str: ...
    def decide(self, envelope: Envelope) -> Decision: ...


_T = TypeVar("_T", bound=Judging)


def check_depth(code: str, path: str) -> None:
    """Raises `InvalidField` for brackets that stand too deep in each other; `code` is without texts and comments."""
    depth = 0
    for found in code:
        if found in "([{":
            depth += 1
        elif found in ")]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise invalid(path, f"expected brackets up to {MAX_DEPTH} deep, got deeper ones")


class WatchedFile(Generic[_T]):
    """The policy in a file, read by `read` from its bytes. Raises `InvalidField` when it is wrong at first.

    With `watch` it is looked at, at most once a second, while it is asked, and reloaded when it changed, before that is
    decided; one that changed within the last second, when it is looked at the second time: it may not be written to its
    end. A file that is wrong then is not taken: the policy before it stays, `problem` says what is wrong, and every
    decision carries that in its errors. May be used by several threads.
    """

    def __init__(self, path: str | Path, read: Callable[[bytes], _T], *, watch: bool = False) -> None:
        self.path = Path(path)
        #: What is wrong with the file as it is now; None when it is the one that judges.
        self.problem: str | None = None
        self._read = read
        self._watch = watch
        self._lock = threading.Lock()
        self._next_look = time.monotonic() + WATCHED
        self._seen: tuple[int, ...] | None = None
        self._looked: tuple[int, ...] | None = None
        self._bytes = self._load()
        #: The policy that judges.
        self.policy: _T = read(self._bytes)

    def reload(self) -> bool:
        """Read the file again. True when another policy judges from now on; all of it, or nothing of it."""
        with self._lock:
            try:
                found = self._load()
                if found == self._bytes:
                    self.problem = None
                    return False
                policy = self._read(found)
            except Exception as error:  # whatever a parser raises: the policy before it stays
                self._broken(str(error) if isinstance(error, InvalidField) else brief(f"not read, {error}", 200))
                return False
            self._bytes, self.policy, self.problem = found, policy, None
            return True

    def decide(self, envelope: Envelope) -> Decision:
        """What the policy says that the file held last when it was right. Looks whether it changed, if it is time."""
        self.look()
        decision = self.policy.decide(envelope)
        problem = self.problem
        return decision if problem is None else replace(decision, errors=(*decision.errors, problem))

    def look(self) -> None:
        """With `watch`: reload if it is time to look and the file changed, before anything is decided. Else it costs a
        comparison."""
        now = time.monotonic()
        if not self._watch or now < self._next_look:
            return
        self._next_look = now + WATCHED
        found, looked = self._stat(), self._looked
        self._looked = found
        if found != self._seen and (found is None or found == looked or _is_settled(found)):
            self.reload()

    def _broken(self, said: str) -> None:
        if self.problem is not None and self.problem.endswith(f": {said}"):
            return
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.problem = f"policy file is broken since {since}, revision {self.policy.revision} judges: {said}"
        _logger.warning("%s", self.problem)

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        # The last as a file that is put in its place, or changed within one tick of the clock, may look the same.
        return found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino

    def _load(self) -> bytes:
        # What is written while it is read has another time or size afterwards, and is read again.
        self._seen = self._stat()
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise invalid(
                "policy", f"expected a file that can be read, {brief(error.strerror or str(error))}"
            ) from None


def _is_settled(found: tuple[int, ...]) -> bool:
    """Whether it was not touched for a while."""
    return time.time_ns() - found[0] > WATCHED * 1e9


class FileDecider:
    """The decider of a policy in a file: ``FileDecider.of("policy.cedar", Cedar)``."""

    def __init__(self, file: WatchedFile[Any], declaration: Declaration) -> None:
        self.file = file
        self.declaration = declaration

    @classmethod
    def of(cls, path: str | Path, make: Callable[[str], Any], *, watch: bool = False) -> FileDecider:
        """Of a file that `make` makes a decider of, such as `Cedar` or `Rego`, or a function that gives them options.

        The declaration is that of the first. Raises `InvalidField` when the file is wrong at first.
        """

        def read(data: bytes) -> Any:
            try:
                return make(data.decode("utf-8"))
            except UnicodeDecodeError:
                raise invalid("policy", "expected text in UTF-8") from None

        file: WatchedFile[Any] = WatchedFile(path, read, watch=watch)
        return cls(file, file.policy.declaration)

    def decide(self, envelope: Envelope) -> Decision:
        """What the policy says that the file held last when it was right."""
        return self.file.decide(envelope)

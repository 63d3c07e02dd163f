"""What a replay has done so far, in a file: killed in the middle, it goes on from there.

The first line says what is replayed, each further one what a part of the ledger came to. A line is on the disk before
the next part counts as done; one that was cut off by a crash counts for nothing, and is done again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import msgspec

from execution_envelope.credentials import shown
from execution_envelope.errors import InvalidField
from execution_envelope.review.replay_result import Tally


class Header(msgspec.Struct, frozen=True):
    """What is replayed. Two are the same when all but the bounds is: these are those of the one that began.

    `window` is what was asked for; `since` and `until` what it came to, at `at`. `lengths` are those of chains then, by
    number, and `splits` the ids that divide the envelopes into parts.
    """

    version: Literal[1]
    ledger: str
    sha256: str
    language: str
    hook: str
    kinds: tuple[str, ...] | None
    tenants: tuple[str, ...] | None
    window: str
    at: str
    since: str
    until: str
    after: str
    lengths: dict[int, int]
    splits: tuple[str, ...]

    def differs(self, other: Header) -> str | None:
        """What is not the same, in words."""
        for name, words in _WORDS.items():
            if getattr(self, name) != getattr(other, name):
                return words
        return None

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """Behind which id, and up to and with which, each part is."""
        return list(zip([self.after, *self.splits], [*self.splits, None], strict=True))


_WORDS: Final = {
    "ledger": "ledger",
    "sha256": "policy",
    "language": "language",
    "hook": "hook",
    "kinds": "kinds",
    "tenants": "tenants",
    "window": "time",
}


class Finished(msgspec.Struct, frozen=True):
    """What one part came to."""

    part: int
    tally: Tally


_header: Final = msgspec.json.Decoder(Header).decode
_finished: Final = msgspec.json.Decoder(Finished).decode
_encode: Final = msgspec.json.Encoder().encode


class State:
    """The file. Raises `InvalidField` for one that cannot be read or written, or is that of another replay."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        #: What is replayed: as the file says, where there was one.
        self.header = header
        #: What is done already, by the number of the part.
        self.finished: dict[int, Tally] = {}
        try:
            self._begin()
        except OSError as error:
            raise InvalidField("state", f"expected a file to write to, `{path}`: {error.strerror or error}") from error

    def _begin(self) -> None:
        # It names whose requests change: nobody else may read it.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            lines = file.read().split(b"\n")
            whole = lines[:-1]
            if not whole:
                # Nothing, or the beginning of a first line.
                if lines[-1] and not lines[-1].startswith(b'{"version":1,'):
                    raise InvalidField("state", f"expected the state of a replay, `{self._path}` is another file")
                file.seek(0)
                file.truncate()
                file.write(_encode(self.header) + b"\n")
            else:
                self._read(whole)
                file.truncate(sum(len(line) + 1 for line in whole))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, lines: list[bytes]) -> None:
        try:
            found = _header(lines[0])
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise InvalidField("state", f"expected the state of a replay in `{self._path}`: {error}") from None
        another = found.differs(self.header)
        if another is not None:
            got = f"`{self._path}` is that of another {another}"
            raise InvalidField("state", f"expected the state of this replay, {got}: take another file")
        parts = len(found.parts)
        for number, line in enumerate(lines[1:], start=2):
            try:
                done = _finished(line)
            except (msgspec.MsgspecError, UnicodeError) as error:
                where = f"line {number} of `{self._path}`"
                raise InvalidField("state", f"expected what a part came to in {where}: {error}") from None
            if not 0 <= done.part < parts:
                raise InvalidField("state", f"expected one of {parts} parts, got {shown(done.part)}")
            self.finished[done.part] = done.tally
        self.header = found

    def finish(self, part: int, tally: Tally) -> None:
        """Keep what a part came to, durably."""
        self.finished[part] = tally
        try:
            with self._path.open("ab") as file:
                file.write(_encode(Finished(part, tally)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            problem = f"expected to write to `{self._path}`: {error.strerror or error}"
            raise InvalidField("state", problem) from error

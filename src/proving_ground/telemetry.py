"""What this backend tells the outside of its envelopes: JSON lines and Prometheus metrics."""

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from execution_envelope.telemetry.log import KEYS, LogObserver
from execution_envelope.telemetry.prometheus import PrometheusObserver
from proving_ground.settings import Settings


class JsonLines:
    """A logger as structlog's are, that appends a line for each event to a file, or writes it to standard error.

    It does what `logging` with a formatter and a `WatchedFileHandler` would, in a fraction of the time: there are seven
    events to a request for inference. Raises `OSError` where it cannot write, which is counted, and is on the record.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None
        self._opened: tuple[int, int] | None = None

    def info(self, event: str, **line: Any) -> None:
        self._write("info", event, line)

    def warning(self, event: str, **line: Any) -> None:
        self._write("warning", event, line)

    def error(self, event: str, **line: Any) -> None:
        self._write("error", event, line)

    def _write(self, level: str, event: str, line: dict[str, Any]) -> None:
        found = {"level": level, "event": event, **{key: line[key] for key in KEYS if key in line}}
        data = msgspec.json.encode(found) + b"\n"
        if self._path is None:
            sys.stderr.write(data.decode())
            return
        # Whole lines in one call: several processes append to it, `envelope approve` too.
        os.write(self._of(self._path), data)

    def _of(self, path: Path) -> int:
        """The file; the new one when it was rotated."""
        try:
            now = path.stat()
            if self._file is not None and (now.st_dev, now.st_ino) == self._opened:
                return self._file
        except FileNotFoundError:
            pass
        if self._file is not None:
            os.close(self._file)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        now = os.fstat(self._file)
        self._opened = (now.st_dev, now.st_ino)
        return self._file


def observers(settings: Settings) -> tuple[LogObserver, PrometheusObserver]:
    """The log as the settings say, and the counters behind `/metrics`."""
    return LogObserver(JsonLines(settings.log)), PrometheusObserver()

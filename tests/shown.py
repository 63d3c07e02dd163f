"""Runs a page as somebody would who follows it: writes its files, runs its commands, compares what they print.

On the page a comment before a block says what it is: ``<!-- file: NAME -->`` for a file that is written,
``<!-- runs -->`` for a console in which lines that begin with ``$`` are run and the others are what is printed, with
``...`` for anything, and ``<!-- restart -->`` for starting what runs in the background again. ``kill -9 %1`` kills what
was started first of what runs in the background, as it does in a shell.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
_STEP = re.compile(
    r"<!-- (?:file: (?P<file>\S+)|(?P<runs>runs)|(?P<restart>restart)) -->\n(?:```\w*\n(?P<block>.*?)```)?", re.S
)
_KILL = re.compile(r"kill -9 %(?P<job>\d)")
_PORT = re.compile(r"\b80\d\d\b")


@dataclass
class Page:
    """A page that is followed in a folder of its own."""

    text: str
    folder: Path
    ports: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def follow(self) -> Iterator[tuple[str, str, str]]:
        """(command, expected, printed) of each command, in order. What runs in the background is ended at the end."""
        bin = str(Path(sys.executable).parent)
        self.environment = os.environ | {
            "PATH": os.pathsep.join([bin, os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT / "src"),
            "COLUMNS": "120",
        }
        try:
            for step in _STEP.finditer(self.text):
                block = self._own(step["block"] or "")
                if step["restart"]:
                    for command in list(self.running):
                        self._stop(command)
                        self._start(command)
                elif step["file"]:
                    (self.folder / step["file"]).write_text(block)
                else:
                    for command, expected in commands(block):
                        yield command, expected, self._run(command)
        finally:
            for command in list(self.running):
                self._stop(command)

    def _own(self, text: str) -> str:
        """With ports that are free in the place of those that are shown."""
        for port in _PORT.findall(text):
            if port not in self.ports:
                with socket.socket() as one:
                    one.bind(("127.0.0.1", 0))
                    self.ports[port] = str(one.getsockname()[1])
        return _PORT.sub(lambda found: self.ports[found[0]], text)

    def _run(self, command: str) -> str:
        if command.endswith("&"):
            self._start(command.removesuffix("&").strip())
            return ""
        if killed := _KILL.fullmatch(command):
            self._kill(list(self.running)[int(killed["job"]) - 1])
            return ""
        kept = self.folder / ".environment"
        # What a command exports is there for the next one.
        script = f"set -a\n{command}\nstatus=$?\nenv -0 > {kept}\nexit $status"
        bash = shutil.which("bash")
        assert bash is not None
        done = subprocess.run(
            [bash, "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if kept.exists():
            pairs = (line.partition("=") for line in kept.read_text().split("\0") if line)
            self.environment = {name: value for name, _, value in pairs}
            kept.unlink()
        return done.stdout

    def _start(self, command: str) -> None:
        log = (self.folder / "background.log").open("ab")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdout=log, stderr=log
        )
        log.close()
        self.running[command] = process
        ports = [port for port in self.ports.values() if port in command]
        deadline = time.monotonic() + 30
        while ports and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(ports[0])), timeout=1):
                return
            if process.poll() is not None:
                break
            time.sleep(0.05)
        assert not ports, f"{command} does not listen: {(self.folder / 'background.log').read_text()}"

    def _kill(self, command: str) -> None:
        process = self.running.pop(command)
        process.kill()
        process.wait()

    def _stop(self, command: str) -> None:
        process = self.running.pop(command)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def commands(block: str) -> Iterator[tuple[str, str]]:
    """(command, what is shown below it) of a console."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        while command.endswith("\\"):
            more, _, expected = expected.partition("\n")
            command = f"{command}\n{more}"
        yield command, expected


def fits(expected: str, printed: str) -> bool:
    """Whether it was printed as shown. Spaces at the ends of lines do not count; ``...`` stands for anything."""
    trimmed = ["\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, printed)]
    pattern = ".*".join(re.escape(piece) for piece in trimmed[0].split("..."))
    return re.fullmatch(pattern, trimmed[1], re.S) is not None

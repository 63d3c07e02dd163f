"""Hooks that are run in processes of their own, which import this: it imports no more than they need."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from execution_envelope import Decision, Declaration
from execution_envelope.envelope import Envelope


class Isolated:
    """Does what the operation of the envelope says."""

    def __init__(self, **declared: Any) -> None:
        self.declaration = Declaration(name="isolated", isolated=True, **declared)

    def decide(self, envelope: Envelope) -> Any:
        return getattr(self, envelope.execution.operation)(envelope)

    def answer(self, envelope: Envelope) -> Decision:
        return Decision.warn(f"process {os.getpid()}")

    def full(self, envelope: Envelope) -> Decision:
        return Decision.allow(limits={"replicas": 2, "memory": "1GiB", "region": ["eu-west"]})

    async def awaited(self, envelope: Envelope) -> Decision:
        return Decision.warn("awaited")

    def reads(self, envelope: Envelope) -> Decision:
        return Decision.warn("read" if "care" in envelope.scope.hints else "none")

    def hang(self, envelope: Envelope) -> Decision:
        while True:
            time.sleep(9)

    def spin(self, envelope: Envelope) -> Decision:
        while True:
            pass

    def grow(self, envelope: Envelope) -> Decision:
        grown = []
        while True:
            grown.append(bytearray(1024 * 1024))

    def raises(self, envelope: Envelope) -> Decision:
        raise LookupError("no such rule")

    def exits(self, envelope: Envelope) -> Decision:
        sys.exit(3)

    def leaves(self, envelope: Envelope) -> Decision:
        os._exit(3)

    def interrupts(self, envelope: Envelope) -> Decision:
        raise KeyboardInterrupt

    def nonsense(self, envelope: Envelope) -> Any:
        return {"outcome": "allow"}

    def prints(self, envelope: Envelope) -> Decision:
        os.write(1, b"RETURN 9\n")
        return Decision.allow()

    def forks(self, envelope: Envelope) -> Decision:
        return Decision.warn("child" if os.fork() == 0 else "parent")

    def starts(self, envelope: Envelope) -> Decision:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
        return Decision.warn(f"started {child.pid}")


class SlowToLoad(Isolated):
    """Takes a second before it can be asked."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        time.sleep(1)
        self.__dict__.update(state)

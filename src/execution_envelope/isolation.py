"""Processes of one isolated hook: each may use only so much memory, and is killed when it does not answer.

Not AnyIO's: its workers are shared with the application, end with the event loop, outlive a cancellation that comes
while they start, and an answer of a copy that a hook forks would be taken for that of the next request.

This is no sandbox: the hook runs as the same user and may do what that user may.
"""

from __future__ import annotations

import inspect
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable
from contextlib import suppress
from multiprocessing import Pipe, spawn
from multiprocessing.connection import Connection
from typing import Any, Final

import anyio
import msgspec

from execution_envelope.answers import Answer, failed, raised, understood, watched
from execution_envelope.credentials import brief
from execution_envelope.decision import Decider, Declaration
from execution_envelope.envelope import decode
from execution_envelope.errors import InvalidField

#: For how long a process may start, in seconds, whatever the deadline of who waits for it: it is for the next one then.
START: Final = 20.0
#: What a verdict with everything that is bounded in it stays below, in bytes.
_MAX_BYTES: Final = 4 * 1024 * 1024
#: Everything is read before anything of the application's is imported, so that writing it never waits for that.
_MAIN: Final = """
from multiprocessing.connection import Connection
connection = Connection({connection})
paths, prepared, hook = connection.recv(), connection.recv(), connection.recv_bytes()
import sys
sys.path[:] = paths
from execution_envelope.isolation import serve
serve(connection, {life}, prepared, hook)
"""

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Answer).decode


class Starting(TimeoutError):
    """The process was still starting."""


class Processes:
    """The processes of one hook. From threads; who calls bounds how many at once, and so how many there are.

    Raises `InvalidField` for a hook that cannot be pickled.
    """

    def __init__(self, hook: Decider, declared: Declaration) -> None:
        try:
            self._hook = pickle.dumps((hook, declared))
        except Exception as error:
            problem = f"expected a hook that can be pickled, because it is isolated: {brief(str(error), 200)}"
            raise InvalidField(f"hooks.{declared.name}", problem) from error
        self._name = declared.name
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def ask(self, body: bytes, until: float) -> Answer:
        """What the hook says of the envelope in `body`, canonical bytes, until the monotonic clock says so.

        Raises `TimeoutError`, after it was killed, `Starting`, and `EOFError` when it ended by itself.
        """
        process = self._free() or _Process(self._name, self._hook)
        try:
            answer, clean = process.ask(body, until)
        except Starting:
            clean = time.monotonic() < process.began + START
            raise
        except BaseException:
            clean = False
            raise
        finally:
            if clean:
                with self._lock:
                    self._idle.append(process)
            else:
                process.kill()
        return answer

    def _free(self) -> _Process | None:
        """One that lives; of those rather one that is ready."""
        with self._lock:
            self._idle.sort(key=lambda process: process.ready)
            while self._idle:
                process = self._idle.pop()
                if not process.ready or not process.ended:
                    return process
                process.kill()
        return None


class _Process:
    def __init__(self, name: str, hook: bytes) -> None:
        self.began = time.monotonic()
        self.ready = False
        prepared = spawn.get_preparation_data(f"hook {name}")
        prepared.pop("authkey", None)
        if b"__main__" not in hook:
            # Importing it again takes time, and may do anything.
            prepared.pop("init_main_from_name", None)
            prepared.pop("init_main_from_path", None)
        ours, theirs = Pipe()
        life, held = os.pipe()
        try:
            self._process = subprocess.Popen(
                [spawn.get_executable(), "-c", _MAIN.format(connection=theirs.fileno(), life=life)],
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(held)
            raise
        finally:
            theirs.close()
            os.close(life)
        self._connection = ours
        self._end = weakref.finalize(self, _end, os.getpid(), self._process, ours, held)
        try:
            for said in (sys.path, prepared):
                ours.send(said)
            ours.send_bytes(hook)
        except BaseException:
            self.kill()
            raise

    @property
    def ended(self) -> bool:
        """Of one that is asked nothing, and so says nothing."""
        return self._connection.poll(0)

    def ask(self, body: bytes, until: float) -> tuple[Answer, bool]:
        """What it answers, and whether it left nothing behind and can be asked again."""
        try:
            if not self.ready:
                if not self._poll(until):
                    raise Starting("its process was still starting at the deadline")
                self._connection.recv_bytes()
                self.ready = True
            self._connection.send_bytes(body)
            if not self._poll(until):
                raise TimeoutError("no answer before the deadline, its process was killed")
            said = self._connection.recv_bytes(_MAX_BYTES)
        except (EOFError, ConnectionError) as error:
            raise EOFError(self._ended()) from error
        return _decode(said[1:]), said[:1] == b"+"

    def _poll(self, until: float) -> bool:
        # Whoever waits may have no deadline at all.
        left = until - time.monotonic()
        return self._connection.poll(min(max(0.0, left), threading.TIMEOUT_MAX))

    def _ended(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "its process closed its connection"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its process ended without an answer: {how}"

    def kill(self) -> None:
        """It and what it started, as far as that did not leave its session."""
        self._end()


def _end(owner: int, process: subprocess.Popen[bytes], connection: Connection, held: int) -> None:
    connection.close()
    os.close(held)
    if owner != os.getpid():
        process.returncode = 0  # in a forked child: it is the parent's, and the child is not to wait for it
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)


_all: weakref.WeakSet[Processes] = weakref.WeakSet()


def _after_fork() -> None:
    for processes in _all:
        processes._begin()


os.register_at_fork(after_in_child=_after_fork)


# In the process of the hook


def serve(connection: Connection, life: int, prepared: dict[str, Any], pickled: bytes) -> None:
    """Answer until the other side is gone."""
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    spawn.prepare(prepared)
    hook, declared = pickle.loads(pickled)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (declared.memory if hard < 0 else min(declared.memory, hard), hard))
    me = os.getpid()
    connection.send_bytes(b"ready")
    while True:
        try:
            body = connection.recv_bytes()
        except EOFError:
            return
        answer = _encode(_decided(hook, declared, body))
        if os.getpid() != me:
            os._exit(0)  # a copy that the hook made of this process: nobody asked it
        connection.send_bytes((b"-" if _left_behind() else b"+") + answer)


def _end_with(life: int) -> None:
    """End when the other side does, in whatever way, also while the hook hangs."""
    os.read(life, 1)
    os._exit(1)


def _decided(hook: Decider, declared: Declaration, body: bytes) -> Answer:
    start = time.monotonic()
    envelope, read = watched(decode(body))
    try:
        said: Any = hook.decide(envelope)
        if inspect.isawaitable(said):
            said = anyio.run(_wait, said)
        return understood(declared, said, read, shadow=False, start=start)
    except BaseException as error:  # a hook that calls sys.exit is to be asked again
        return failed(declared, "error", raised(error), read, shadow=False, start=start)


async def _wait(said: Awaitable[Any]) -> Any:
    return await said


def _left_behind() -> bool:
    """Whether the hook started processes that go on."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
        return True
    return False

"""Hooks in processes of their own: whatever they do there, the request ends, and the next one is unaffected."""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from execution_envelope import Decision, Declaration, InvalidField
from execution_envelope.envelope import Envelope, seal
from execution_envelope.hooks import MAX_PROCESSES, Decided, HookChain
from execution_envelope.lifecycle import Verdict
from execution_envelope.testing import START, ask
from tests.isolated_hooks import Isolated, SlowToLoad

MEMORY = 100 * 1024 * 1024
STARTED = 10.0


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def envelope(operation: str, **overrides: object) -> Envelope:
    return seal(ask(operation=operation, **overrides), id="x", now=START).envelope


@pytest.fixture(scope="module")
def chain() -> Iterator[HookChain]:
    """The same for all, over many event loops: each test finds what the one before left."""
    chain = HookChain([Isolated(memory=MEMORY)], deadline=STARTED)
    asked(chain, "answer")
    yield chain


def asked(chain: HookChain, operation: str, backend: str = "asyncio", deadline: float = STARTED) -> Verdict:
    async def decide() -> Decided:
        return await chain.decide(envelope(operation))

    chain._deadline = deadline
    [verdict] = anyio.run(decide, backend=backend).verdicts
    chain._deadline = STARTED
    return verdict


def pid(verdict: Verdict) -> int:
    assert verdict.failure is None, verdict
    return int(re.findall(r"\d+", verdict.message or "")[0])


def state(process: int | str) -> list[str]:
    """State, parent, and so on; of one that is gone nothing."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def workers() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        if state(folder.name)[1:2] == [str(os.getpid())]:
            with suppress(OSError):
                if b"execution_envelope" in (folder / "cmdline").read_bytes():
                    found.add(int(folder.name))
    return found


def gone(process: int) -> bool:
    for _ in range(100):
        if state(process)[:1] in ([], ["Z"]):
            return True
        time.sleep(0.02)
    return False


def test_it_answers_as_elsewhere(chain: HookChain, anyio_backend: str) -> None:
    full = asked(chain, "full", anyio_backend)
    assert (full.decision, full.limits, dict(full.allowed)) == (
        "allow",
        {"replicas": 2, "memory": 2**30},
        {"region": ("eu-west",)},
    )
    assert asked(chain, "awaited", anyio_backend).message == "awaited"
    assert full.duration_us > 0


def test_the_process_stays_over_requests_and_event_loops(chain: HookChain) -> None:
    assert len({pid(asked(chain, "answer", backend)) for backend in ("asyncio", "trio", "asyncio")}) == 1


@pytest.mark.parametrize(
    ("operation", "failure", "message"),
    [
        ("raises", "error", "LookupError: no such rule"),
        ("exits", "error", "SystemExit: 3"),
        ("leaves", "error", "its process ended without an answer: exit code 3"),
        ("interrupts", "error", "KeyboardInterrupt"),
        ("grow", "error", "MemoryError"),
        ("nonsense", "invalid", "expected a Decision, got `dict`"),
    ],
)
def test_what_it_does_there_stays_there(
    chain: HookChain, anyio_backend: str, operation: str, failure: str, message: str
) -> None:
    failed = asked(chain, operation, anyio_backend)
    assert (failed.failure, failed.failure_mode, failed.decision, failed.code) == (
        failure,
        "deny",
        "deny",
        "hook_error",
    )
    assert message in (failed.message or "")
    assert asked(chain, "answer", anyio_backend).failure is None


@pytest.mark.parametrize("operation", ["hang", "spin"])
def test_one_that_hangs_is_killed(chain: HookChain, anyio_backend: str, operation: str) -> None:
    before = pid(asked(chain, "answer", anyio_backend))
    start = time.monotonic()
    failed = asked(chain, operation, anyio_backend, deadline=0.2)
    assert time.monotonic() - start < 1
    assert (failed.failure, failed.code) == ("timeout", "hook_timeout")
    assert "no answer before the deadline" in (failed.message or "")
    assert gone(before)
    assert pid(asked(chain, "answer", anyio_backend)) != before


def test_it_may_write_to_its_standard_output(chain: HookChain) -> None:
    assert asked(chain, "prints").decision == "allow"
    assert asked(chain, "answer").failure is None


def test_a_copy_that_it_forks_answers_nobody(chain: HookChain) -> None:
    for _ in range(5):
        assert asked(chain, "forks").message == "parent"
        assert asked(chain, "answer").message != "child"


def test_what_it_starts_ends_with_its_answer(chain: HookChain) -> None:
    assert gone(pid(asked(chain, "starts")))
    assert asked(chain, "answer").failure is None


def test_one_that_was_killed_meanwhile_is_replaced(chain: HookChain) -> None:
    before = pid(asked(chain, "answer"))
    os.kill(before, signal.SIGKILL)
    time.sleep(0.05)
    assert pid(asked(chain, "answer")) != before


def test_hints_that_it_reads_are_seen(chain: HookChain) -> None:
    async def decide(operation: str) -> tuple[str, ...]:
        hinted = envelope(operation, scope={"hints": {"care": "high", "other": "x"}})
        [verdict] = (await chain.decide(hinted)).verdicts
        assert verdict.failure is None
        return verdict.hints

    assert anyio.run(decide, "reads") == ("care",)
    assert anyio.run(decide, "answer") == ()


@pytest.mark.anyio
async def test_one_that_takes_long_to_start_starts_on_for_the_next_request(anyio_backend: str) -> None:
    before = workers()
    chain = HookChain([SlowToLoad()], deadline=0.3)
    [first] = (await chain.decide(envelope("answer"))).verdicts
    assert first.failure == "timeout"
    for _ in range(20):
        [next_one] = (await chain.decide(envelope("answer"))).verdicts
        if next_one.failure is None:
            break
    assert next_one.failure is None
    assert len(workers() - before) <= MAX_PROCESSES, "expected not one more for every request"


@pytest.mark.anyio
async def test_the_processes_of_a_hook_are_bounded(anyio_backend: str) -> None:
    chain = HookChain([Isolated()], deadline=4)
    before, start, failures = workers(), time.monotonic(), []

    async def hang() -> None:
        [verdict] = (await chain.decide(envelope("hang"))).verdicts
        failures.append(verdict.failure)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(hang)
        while len(workers() - before) < MAX_PROCESSES and time.monotonic() - start < 3:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        await anyio.sleep(0.5)
        hung = workers() - before
        assert len(hung) == MAX_PROCESSES
    assert time.monotonic() - start < 5.5
    assert failures == ["timeout"] * 6
    assert all(gone(process) for process in hung)
    # One may have begun to start for a request that had almost no time left: it is for the next one.
    assert len(workers() - before) <= MAX_PROCESSES


@pytest.mark.anyio
async def test_a_request_that_is_cancelled_waits_for_no_process(anyio_backend: str) -> None:
    chain = HookChain([Isolated()], deadline=1)
    start = time.monotonic()
    with anyio.move_on_after(0.05) as scope:
        await chain.decide(envelope("hang"))
    assert scope.cancelled_caught and time.monotonic() - start < 0.5
    await anyio.sleep(1.2)
    assert (await HookChain([Isolated()], deadline=STARTED).decide(envelope("answer"))).verdicts[0].failure is None


def test_it_ends_with_the_chain() -> None:
    chain = HookChain([Isolated()], deadline=STARTED)
    process = pid(asked(chain, "answer"))
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    del chain
    # A thread that waits for more gives up what it was called with.
    for _ in range(50):
        gc.collect()
        if len(os.listdir("/proc/self/fd")) < opened:  # noqa: PTH208
            break
        time.sleep(0.02)
    assert gone(process)
    assert len(os.listdir("/proc/self/fd")) < opened  # noqa: PTH208


def test_a_forked_child_has_processes_and_threads_of_its_own(chain: HookChain) -> None:
    mine = pid(asked(chain, "answer"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            theirs = pid(asked(chain, "answer"))
            code = 0 if theirs != mine else 2
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pid(asked(chain, "answer")) == mine


class Unpicklable:
    declaration = Declaration(name="u", isolated=True)

    def __init__(self) -> None:
        self.check: Callable[[], None] = lambda: None

    def decide(self, envelope: Envelope) -> Decision:
        return Decision.allow()


def test_one_that_cannot_be_pickled_is_refused_at_once() -> None:
    with pytest.raises(InvalidField, match="expected a hook that can be pickled") as refused:
        HookChain([Unpicklable()], deadline=1)
    assert refused.value.field == "hooks.u"

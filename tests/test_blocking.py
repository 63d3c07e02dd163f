"""The seam without an event loop: in many threads, in forked children, and when it is interrupted."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from execution_envelope import Admission, AdmissionController, Grant, Liveness, lifecycle
from execution_envelope.blocking import BlockingController
from execution_envelope.ledger import verify
from execution_envelope.record import Record
from execution_envelope.testing import ask

GPU = Grant({"gpu": 1})


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[AdmissionController]:
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    yield controller
    controller.ledger.close()


@pytest.fixture
def seam(controller: AdmissionController) -> BlockingController:
    return controller.blocking()


def test_it_offers_all_that_the_controller_does() -> None:
    def offered(of: type) -> set[str]:
        return {name for name, value in inspect.getmembers(of, callable) if not name.startswith("_")}

    # Scripts are told of no requests that they never got, and each makes its own controller.
    left_out = {"attempted", "open", "conservation", "blocking", "aclose"}
    assert offered(AdmissionController) - left_out <= offered(BlockingController)


def test_every_method_of_an_admission_is_there(seam: BlockingController) -> None:
    with seam.admit(ask()) as admission:
        for name, method in inspect.getmembers(Admission, inspect.iscoroutinefunction):
            if not name.startswith("_"):
                assert not inspect.iscoroutinefunction(getattr(admission, name)), method


def test_an_admission_may_be_begun_here_and_left_there(seam: BlockingController) -> None:
    admission = seam.begin(ask())
    admission.grant(GPU)
    worker = threading.Thread(target=admission.leave, kwargs={"failed": ("Boom", "it broke")})
    worker.start()
    worker.join()
    assert seam.read(admission.id).events[-1].data == lifecycle.Failed("Boom", "it broke")


def test_a_script_reconciles_and_closes(seam: BlockingController, controller: AdmissionController) -> None:
    with seam.admit(ask()) as admission:
        admission.bind("job", "j-1", owner="batch")

    async def gone(record: Record) -> Liveness:
        return Liveness.gone("no such job")

    assert seam.reconcile({"batch": gone}, everything=True).ids("gone") == [admission.id]
    assert seam.read("job", "j-1").state == "abandoned"
    seam.close()
    counts = controller.conservation()
    assert (counts.emitted, counts.dropped, counts.pending) == (counts.stored, 0, 0)


def test_one_loop_is_kept_while_it_is_said(seam: BlockingController) -> None:
    def loops() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "-portal-" in thread.name]

    assert loops() == []
    with seam.running():
        [one] = loops()
        with seam.admit(ask()) as admission:
            assert loops() == [one]
        assert seam.read(admission.id).state == "completed" and loops() == [one]
    assert loops() == []


def test_sixteen_threads_share_one_seam_and_one_admission(
    seam: BlockingController, controller: AdmissionController
) -> None:
    shared, together = seam.begin(ask()), threading.Barrier(16)

    def work(number: int) -> None:
        together.wait()
        for _ in range(4):
            with seam.admit(ask()) as admission:
                admission.grant(GPU)
            shared.used({"steps": 1})
            seam.resume(admission.id, by=f"worker-{number}").used({"rows": 1})

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, number) for number in range(16)]:
            done.result()
    shared.leave()
    assert seam.read(shared.id).used["steps"].amount == 64
    assert controller.counters["admitted"] == 65 and controller.ledger.unfinished() == []
    assert verify(controller.ledger).sound


def test_forked_children_use_it_as_their_parent_does(seam: BlockingController, controller: AdmissionController) -> None:
    """Forked while the parent's loop runs and threads of it use it: none of those is in the child."""
    context, queue = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Queue()
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            with seam.admit(ask()):
                pass

    def child(inherited: str) -> None:
        with seam.admit(ask()) as admission:
            admission.grant(GPU)
        seam.resume(inherited, by="child").ready()
        queue.put((os.getpid(), admission.id))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with seam.admit(ask()) as mine:
            mine.grant(GPU)
            children = [context.Process(target=child, args=(mine.id,)) for _ in range(3)]
            for process in children:
                process.start()
            ids = [queue.get(timeout=20)[1] for _ in children]
            for process in children:
                process.join(20)
                assert process.exitcode == 0
            assert seam.read(mine.id).is_open
    finally:
        stop.set()
        thread.join()
    assert [seam.read(id).state for id in [*ids, mine.id]] == ["completed"] * 4
    assert "child" in [event.by for event in seam.read(mine.id).events]
    assert verify(controller.ledger).sound


def test_a_child_that_is_forked_in_a_block_does_not_end_it(seam: BlockingController) -> None:
    with seam.admit(ask()) as admission:
        admission.grant(GPU)
        child = 0
        try:
            with seam.admit(ask()) as inner:
                child = os.fork()
                if child == 0:
                    raise SystemExit  # unwinds this block and the next one in the child, and ends neither
        except SystemExit:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (seam.read(inner.id).state, seam.read(admission.id).state) == ("completed", "granted")
        assert len(seam.read(inner.id).events) == 3


SCRIPT = """
import sys, time
from execution_envelope import AdmissionController, Decision, Grant, Rule
from execution_envelope.testing import ask

where, url = sys.argv[1:]

def slow(envelope):
    print("deciding", flush=True)
    time.sleep(0.5)

hooks = [Rule("slow", slow)] if where == "entering" else []
seam = AdmissionController.open(url, hooks=hooks, deadline=5).blocking()
with seam.admit(ask()) as admission:
    if where == "granted":
        admission.grant(Grant({"gpu": 1}))
    if where == "bound":
        admission.bind("job", "j-1", owner="batch")
    print(admission.id, flush=True)
    time.sleep(20)
"""


@pytest.mark.parametrize("where", ["admitted", "granted", "bound"])
def test_ctrl_c_in_the_block_cancels_what_is_not_bound(
    where: str, tmp_path: Path, seam: BlockingController, controller: AdmissionController
) -> None:
    id = _interrupted(where, tmp_path)
    record, text = seam.read(id), "KeyboardInterrupt while it was resolved"
    if where == "bound":
        assert (record.state, record.events[-1].data) == ("admitted", lifecycle.Error(text))
    else:
        assert record.events[-1].data == lifecycle.Cancelled(text)


def test_ctrl_c_on_the_way_into_the_block_leaves_nothing_open(
    tmp_path: Path, seam: BlockingController, controller: AdmissionController
) -> None:
    assert _interrupted("entering", tmp_path) == "deciding"
    [id] = controller.ledger.newest(9)
    assert seam.read(id).events[-1].data == lifecycle.Cancelled("KeyboardInterrupt while it was resolved")


def _interrupted(where: str, folder: Path) -> str:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, where, f"sqlite:///{folder}/l.db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    said = child.stdout.readline().strip()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt") and child.returncode != 0
    return said

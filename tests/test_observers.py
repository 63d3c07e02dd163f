"""Observers are told behind the request: in order, once, and whatever they do is nobody else's trouble."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from execution_envelope import observers as module
from execution_envelope.decision import Declaration, Observation
from execution_envelope.envelope import seal
from execution_envelope.lifecycle import Admitted, Error, Event, Ready, Sealed
from execution_envelope.observers import Observers
from execution_envelope.record import Record
from execution_envelope.testing import START, ask

AT = "2026-05-01T12:00:00.000000Z"


class Watcher:
    """An observer from a function."""

    def __init__(self, observe: Callable[[Observation], Any], name: str = "w", kinds: Any = None) -> None:
        self.declaration = Declaration(name=name, kinds=kinds)
        self.observe = observe


def admitted(id: str = "e", **overrides: Any) -> Record:
    envelope = seal(ask(**overrides), id=id, now=START).envelope
    return Record(envelope, [Event(id, 0, AT, "b", Sealed("d", "r")), Event(id, 1, AT, "b", Admitted())])


def add(record: Record, data: Any) -> list[Event]:
    event = Event(record.id, record.next_sequence, AT, "b", data)
    record.apply(event)
    return [event]


def test_what_an_observer_is_told_does_not_change_when_the_record_goes_on() -> None:
    go, seen = threading.Event(), list[tuple[str, list[int], int, str]]()

    def observe(observation: Observation) -> None:
        go.wait(5)
        told = [event.sequence for event in observation.events]
        seen.append((observation.state, told, observation.record.next_sequence, observation.record.state))

    counters = Counter[str]()
    observers = Observers([Watcher(observe)], counters)
    record = admitted()
    observers.tell(record, record.events[:2])
    for n in range(3):
        observers.tell(record, add(record, Ready(str(n))))
    go.set()
    observers.close()
    assert seen == [
        ("admitted", [0, 1], 2, "admitted"),
        *(("admitted", [n], n + 1, "admitted") for n in (2, 3, 4)),
    ]
    assert counters == {"observed": 4, "observer_dropped": 0}


def test_one_that_hangs_delays_neither_the_request_nor_another_observer() -> None:
    release, told = threading.Event(), threading.Event()
    counters = Counter[str]()
    hanging = Watcher(lambda _: release.wait(10), "hanging")
    observers = Observers([hanging, Watcher(lambda _: told.set(), "quick")], counters)
    record = admitted()
    start = time.monotonic()
    for _ in range(3):
        observers.tell(record, record.events[:2])
    assert time.monotonic() - start < 0.5
    assert told.wait(5)
    observers.close(timeout=0.2)
    assert time.monotonic() - start < 5
    assert counters == {"observed": 3, "observer_dropped": 3}
    release.set()  # what comes back is not counted a second time
    for thread in threading.enumerate():
        if thread.name == "observer hanging":
            thread.join(5)
            assert not thread.is_alive()
    assert counters == {"observed": 3, "observer_dropped": 3}


def test_what_does_not_fit_into_the_queue_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 5)
    go, begun, seen = threading.Event(), threading.Event(), list[int]()

    def observe(observation: Observation) -> None:
        begun.set()
        go.wait(5)
        seen.append(observation.events[0].sequence)

    counters = Counter[str]()
    observers = Observers([Watcher(observe)], counters)
    record = admitted()
    observers.tell(record, add(record, Ready("0")))
    assert begun.wait(5)
    for n in range(1, 9):
        observers.tell(record, add(record, Ready(str(n))))
    go.set()
    observers.close()
    assert seen == [2, 3, 4, 5, 6, 7]  # the oldest, in order
    assert counters == {"observed": 6, "observer_dropped": 3}


def test_kinds_that_it_does_not_cover_are_not_told() -> None:
    seen = list[str]()
    watcher = Watcher(lambda o: seen.append(o.envelope.execution.kind), kinds=frozenset({"inference"}))
    counters = Counter[str]()
    observers = Observers([watcher], counters)
    for kind in ("model.deploy", "inference"):
        record = admitted(kind=kind)
        observers.tell(record, record.events[:2])
    observers.close()
    assert seen == ["inference"]
    assert counters["observed"] == 1


@pytest.mark.parametrize("failing", [ValueError("no: sk-ant-" + "a" * 24), SystemExit(3), KeyboardInterrupt()])
def test_a_failure_is_reported_once_for_each_envelope_and_never_for_ever(failing: BaseException) -> None:
    """The report is recorded, told to the observer, which fails again: that is where it ends."""
    reports = list[tuple[str, Error]]()
    records = {id: admitted(id) for id in ("a", "b")}

    def observe(observation: Observation) -> None:
        raise failing

    def report(id: str, error: Error) -> None:
        reports.append((id, error))
        observers.tell(records[id], add(records[id], error))

    counters = Counter[str]()
    observers = Observers([Watcher(observe, "x"), Watcher(observe, "y")], counters, report)
    for record in records.values():
        observers.tell(record, record.events[:2])
    wait_for(lambda: counters["observer_failed"] >= 12)
    observers.close()
    assert sorted((id, error.hook) for id, error in reports) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert all(error.text.startswith(type(failing).__name__) and "sk-ant" not in error.text for _, error in reports)
    # Two envelopes, each told of its admission and of two errors, to two observers.
    assert counters["observer_failed"] == 12
    assert counters["observed"] == counters["observer_dropped"] == 0


def test_what_the_record_says_already_is_not_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 1)
    reports = list[str]()
    observers = Observers([Watcher(lambda _: 1 / 0)], Counter(), lambda id, error: reports.append(id))
    known, other = admitted("known"), admitted("other")
    observers.tell(known, add(known, Error("before", hook="w")))
    for record in (other, admitted("third"), other):
        observers.tell(record, record.events[:2])
    observers.close()
    assert reports == ["other", "third", "other"]  # forgotten, and not on this record


def test_a_report_that_cannot_be_taken_is_counted() -> None:
    counters = Counter[str]()
    observers = Observers([Watcher(lambda _: 1 / 0)], counters, lambda id, error: sys.exit(1))
    record = admitted()
    observers.tell(record, record.events[:2])
    observers.close()
    assert counters == {"observer_failed": 1, "observer_unreported": 1, "observer_dropped": 0}


@pytest.mark.filterwarnings("error")
def test_an_observer_that_is_async_fails_instead_of_doing_nothing() -> None:
    async def observe(observation: Observation) -> None:
        raise AssertionError

    reports = list[str]()
    observers = Observers([Watcher(observe)], Counter(), lambda id, error: reports.append(error.text))
    record = admitted()
    observers.tell(record, record.events[:2])
    observers.close()
    assert reports == ["InvalidField: expected `def observe`, nobody waits for `async def observe` - at `hooks.w`"]


def test_telling_goes_on_after_close() -> None:
    counters = Counter[str]()
    observers = Observers([Watcher(lambda _: None)], counters)
    record = admitted()
    for expected in (1, 2):
        observers.tell(record, record.events[:2])
        observers.close()
        assert counters["observed"] == expected


def test_every_commit_is_counted_when_threads_tell_and_close() -> None:
    counters = Counter[str]()
    observers = Observers([Watcher(lambda _: time.sleep(0), name) for name in "ab"], counters)
    record, stop = admitted(), threading.Event()
    told = [0, 0, 0]

    def tell(who: int) -> None:
        while not stop.is_set():
            for _ in range(20):
                observers.tell(record, record.events[:2])
            told[who] += 20
            time.sleep(0.001)

    threads = [threading.Thread(target=tell, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        time.sleep(0.005)
        observers.close(timeout=0.001)
    stop.set()
    for thread in threads:
        thread.join()
    observers.close()
    wait_for(lambda: counters["observed"] + counters["observer_dropped"] == 2 * sum(told))


def test_a_thread_that_has_nothing_to_do_ends_and_the_next_commit_starts_another(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "IDLE", 0.001)
    counters = Counter[str]()
    observers, record = Observers([Watcher(lambda _: None, "idle")], counters), admitted()
    for told in range(1, 400):
        observers.tell(record, record.events[:2])
        if told % 7 == 0:
            time.sleep(0.002)
    wait_for(lambda: counters["observed"] == told)
    wait_for(lambda: "observer idle" not in {thread.name for thread in threading.enumerate()})
    observers.tell(record, record.events[:2])
    observers.close()
    assert counters["observed"] == told + 1


def test_a_forked_child_has_threads_of_its_own_and_tells_nothing_twice() -> None:
    go, counters = threading.Event(), Counter[str]()
    reader, writer = os.pipe()

    def observe(observation: Observation) -> None:
        if os.getpid() == parent:
            go.wait(5)
        else:
            os.write(writer, observation.envelope.id.encode())

    parent = os.getpid()
    observers = Observers([Watcher(observe)], counters)
    mine = admitted("parent")
    observers.tell(mine, mine.events[:2])
    pid = os.fork()
    if pid == 0:
        try:
            theirs = admitted("child")
            observers.tell(theirs, theirs.events[:2])
            observers.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as read:
        assert read.read() == b"child"
    go.set()
    observers.close()
    assert counters["observed"] == 1


def test_telling_costs_a_few_microseconds_however_long_the_record_is() -> None:
    """Nothing is copied: a record of ten thousand events is told of as quickly as a short one. Ratios of two measured
    side by side, because the machine is shared."""
    observers = Observers([Watcher(lambda _: None)], Counter())
    short, long = admitted("short"), admitted("long")
    for n in range(10_000):
        long.apply(Event("long", n + 2, AT, "b", Ready(str(n))))
    spent = {"short": 1.0, "long": 1.0}
    for _ in range(20):
        for record in (short, long):
            last = record.events[-1:]
            start = time.perf_counter()
            for _ in range(100):
                observers.tell(record, last)
            spent[record.id] = min(spent[record.id], time.perf_counter() - start)
    observers.close()
    assert spent["long"] < 5 * spent["short"]
    assert spent["short"] / 100 < 100e-6


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)

"""A rush on one account: four processes ask at once for more than there is room for, and some are killed meanwhile.

What a child does is a function of (pipe, part), see `ask_at_once`. It says ``(kind, envelope, amount)``: *ready* when
it is, and waits to be told to go; *admitted* or *refused* of each ask, as soon as it was answered; then *asked*, and
waits to be told to settle; *settled* of each envelope that it ended, and *done*. `rush` runs a round of such children.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

from execution_envelope.budgets import Balance, Key, entries_of
from execution_envelope.ledger import Ledger, open_ledger
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import BudgetExhausted, Commit
from execution_envelope.lifecycle import Budgeted, BudgetEntry, Cancelled, Completed, EventData
from execution_envelope.testing.commits import admission_of, commit_of, sealed_ask
from tests.children import FORKS

PROCESSES: Final = 4
ASKS: Final = 64
ROOM: Final = 10
#: No wait in here is longer.
DEADLINE: Final = 30.0


class Part(NamedTuple):
    """What one child does: so many asks at once, each for so much of one account."""

    url: str
    name: str
    key: Key
    amount: int
    limit: int
    asks: int
    seed: int


class Told(NamedTuple):
    """What a child said."""

    kind: str
    envelope: str = ""
    amount: int = 0


def ask_at_once(pipe: Any, part: Part) -> None:
    """Reserve by `Ledger.commit`, each ask in a thread of its own; then settle, release or leave what was admitted."""
    ledger, lock, admitted = open_ledger(part.url), threading.Lock(), list[Commit]()
    rng, go = random.Random(part.seed), threading.Event()

    def say(told: Told) -> None:
        with lock:
            pipe.send(tuple(told))

    def ask() -> None:
        commit = reservation(part)
        go.wait(DEADLINE)
        try:
            ledger.commit(commit)
        except BudgetExhausted as refused:
            assert refused.balance.free < part.amount
            say(Told("refused", commit.envelope, part.amount))
        else:
            say(Told("admitted", commit.envelope, part.amount))
            admitted.append(commit)

    asking = started([ask] * part.asks)
    say(Told("ready"))
    assert pipe.recv() == "go"
    go.set()
    joined(asking)
    say(Told("asked"))
    assert pipe.recv() == "settle"
    endings = [ending_of(one, part, rng) for one in admitted]

    def end(commit: Commit) -> Callable[[], None]:
        def settle() -> None:
            ledger.commit(commit)
            say(Told("settled", commit.envelope))

        return settle

    joined(started([end(commit) for commit in endings if commit is not None]))
    ledger.close()
    say(Told("done"))


def started(calls: list[Callable[[], None]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(DEADLINE)


def reservation(part: Part) -> Commit:
    entry = BudgetEntry(*part.key, part.limit, part.amount)
    commit = admission_of(sealed_ask(), Budgeted("reserve", (entry,)))
    return Commit(
        commit.envelope, 0, commit.at, part.name, commit.facts, commit.sealed, within=frozenset({entry.account})
    )


def ending_of(admission: Commit, part: Part, rng: random.Random) -> Commit | None:
    """How an execution ends: with less than was reserved, with more, with nothing; or not at all."""
    spent = rng.choice([None, 0, part.amount // 2, part.amount, part.amount * 3])
    if spent is None:
        return None
    entry = BudgetEntry(*part.key, part.limit, -part.amount, spent)
    end: EventData = Completed() if spent else Cancelled()
    assert admission.sealed is not None
    return commit_of(admission.sealed, len(admission.facts), Budgeted("settle", (entry,)), end)


class Child:
    """A child, and what it said."""

    def __init__(self, target: Callable[..., None], part: Part) -> None:
        self.told: list[Told] = []
        self.reached = {kind: threading.Event() for kind in ("ready", "asked", "done")}
        self._pipe, its = FORKS.Pipe()
        self.process = FORKS.Process(target=target, args=(its, part), daemon=True)
        self.process.start()
        its.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                told = Told(*self._pipe.recv())
                self.told.append(told)
                if told.kind in self.reached:
                    self.reached[told.kind].set()

    def wait(self, kind: str) -> None:
        assert self.reached[kind].wait(DEADLINE), f"{self.told} is all that it said, {self.process.exitcode}"

    def tell(self, what: str) -> None:
        # Nothing that processes share: one that is killed would leave it locked.
        with suppress(OSError):
            self._pipe.send(what)

    def kill(self) -> None:
        self.process.kill()

    def join(self) -> None:
        self.process.join(DEADLINE)
        assert self.process.exitcode is not None
        self._reader.join(DEADLINE)
        assert not self._reader.is_alive()
        self._pipe.close()

    def heard(self, kind: str) -> set[str]:
        return {told.envelope for told in self.told if told.kind == kind}


class Rush(NamedTuple):
    """What came of a round."""

    admitted: set[str]
    kills: int


def rush(
    ledger: Ledger, number: int, rng: random.Random, *, target: Callable[..., None] = ask_at_once, kills: int = 0
) -> Rush:
    """One round on an account of its own: exactly `ROOM` are admitted, whoever is killed; then what they hold is
    settled. `kills` children are killed while they ask, and one while it settles; at random points."""
    assert ledger.url is not None
    key = Key(f"gpus/round-{number}", "now", "gpu")
    amount = rng.randint(1, 9)
    limit = ROOM * amount + rng.randrange(amount)
    children = [
        Child(target, Part(ledger.url, f"p{number}-{n}", key, amount, limit, ASKS // PROCESSES, rng.randrange(2**32)))
        for n in range(PROCESSES)
    ]
    for child in children:
        child.wait("ready")
    for child in children:
        child.tell("go")
    doomed = rng.sample(children, kills)
    for child in doomed:
        time.sleep(rng.random() * 0.02)  # the random point
        child.kill()
    for child in doomed:
        child.join()
    rest = [child for child in children if child not in doomed]
    for child in rest:
        child.wait("asked")
        assert len(child.heard("admitted")) + len(child.heard("refused")) == ASKS // PROCESSES
    # Whoever was refused found it full, and nobody has let go of anything: what stands, stands.
    [balance] = ledger.balances(account=key.account)
    assert balance == Balance(*key, limit, ROOM * amount), balance
    holders, more = ledger.holders(key, ROOM)
    admitted = {holder.envelope for holder in holders}
    assert (len(admitted), more) == (ROOM, 0)
    assert {holder.reserved for holder in holders} == {amount}
    told = set[str]().union(*(child.heard("admitted") for child in children))
    assert told <= admitted and (doomed or told == admitted)
    assert not set[str]().union(*(child.heard("refused") for child in children)) & admitted
    for child in rest:
        child.tell("settle")
    if kills:
        last = rng.choice(rest)
        time.sleep(rng.random() * 0.02)
        last.kill()
        rest.remove(last)
        last.join()
    for child in rest:
        child.join()
        assert child.reached["done"].is_set() and child.process.exitcode == 0
    for child in children:
        for id in child.heard("settled"):
            stored = ledger.read(id)
            assert stored is not None and not stored.record().is_open
    return Rush(admitted, kills + bool(kills))


def entries(ledger: Ledger) -> Iterator[tuple[str, BudgetEntry]]:
    """(envelope, entry) of all that is stored, read from the bytes."""
    for step in ledger.steps():
        assert step.row is not None
        entry = chains.decode(step.row.body)
        yield from ((step.envelope, one) for one in entries_of(entry.event().data))


def conserved(ledger: Ledger) -> int:
    """That what stands is what the events add up to, to the unit, for each balance and each execution; how many
    entries."""
    sums: dict[Key, list[int]] = defaultdict(lambda: [0, 0, 0])
    held: dict[tuple[Key, str], int] = defaultdict(int)
    count = 0
    for envelope, entry in entries(ledger):
        key = Key(entry.account, entry.window, entry.resource)
        for place, amount in enumerate((entry.reserved, entry.spent, entry.unknown)):
            sums[key][place] += amount
        held[key, envelope] += entry.reserved
        count += 1
    assert {Key(b.account, b.window, b.resource): [b.reserved, b.spent, b.unknown] for b in ledger.balances()} == sums
    for key in sums:
        holders, more = ledger.holders(key, 10_000)
        assert more == 0
        assert dict(holders) == {id: amount for (of, id), amount in held.items() if of == key and amount}
    return count

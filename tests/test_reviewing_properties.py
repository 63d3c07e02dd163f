"""Whatever is reviewed, revoked, stopped, refused, ended and reconciled in whatever order: what must always hold."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from execution_envelope import (
    Admission,
    AdmissionController,
    Decision,
    Grant,
    NotLive,
    Record,
    Rule,
    Subject,
    Violation,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, verify
from execution_envelope.lifecycle import Late, Review, Revocation, Revoked, ended
from execution_envelope.reconciliation import Liveness
from execution_envelope.reviewer import PART_OF, Finding, ReviewerDeclaration, Stop
from execution_envelope.testing import ask
from tests.strategies import examples

PEOPLE = {name: Subject("user", name, tenant="acme") for name in ("kim", "leo")}
FINDINGS = {
    "keep": Finding.keep(),
    "flag": Finding.flag("policy", "look"),
    "revoke": Finding.revoke("policy", "no more"),
    "revoke by r2": Finding("revoke", "policy", "no more", revision="r2"),
    "fails": None,
}
ANSWERS = {
    "stopped": Stop.stopped("pid 7 ended"),
    "refused": Stop.refused("pinned"),
    "unknown": Stop.unknown("no answer"),
    "fails": None,
}
ENDS = {
    "complete": lambda handle: handle.complete(),
    "cancel": lambda handle: handle.cancel(),
    "confirm": lambda handle: handle.confirm_revoke("it stopped itself"),
}


class Says:
    def __init__(self, name: str, said: Any) -> None:
        self.declaration = ReviewerDeclaration(name=name, kinds=frozenset({"model.deploy"}))
        self.said = said

    async def review(self, record: Record) -> Finding:
        found = FINDINGS[self.said[record.id]]
        if found is None:
            raise ValueError("no opinion")
        return found


class Reviewed(RuleBasedStateMachine):
    """A few envelopes, some part of others, and a model of who wants which of them revoked."""

    def make_ledger(self) -> Ledger:
        return MemoryLedger()

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.ledger = self.make_ledger()
        allow = Rule("everybody", lambda e: Decision.allow(), kinds=frozenset({"maintenance"}))
        budgets = Budgets([Budget(name="gpus", resource="gpu", limit=100)])
        self.controllers = [AdmissionController(self.ledger, hooks=[allow], budgets=budgets) for _ in range(2)]
        self.handles: list[Admission] = []
        #: id -> reviewers that want it revoked, by what they said last.
        self.wanted: defaultdict[str, set[str]] = defaultdict(set)
        #: Those of which an owner, a process or reconciliation said that they do not run.
        self.gone: set[str] = set()
        self.admit(0, bound=True, part_of=None)

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(step)

    def newest(self, id: str) -> Record:
        record: Record = self.run(self.controllers[0].read(id))
        return record

    def pick(self, number: int) -> Admission:
        return self.handles[number % len(self.handles)]

    @rule(controller=st.integers(0, 1), bound=st.booleans(), part_of=st.none() | st.integers(0, 9))
    def admit(self, controller: int, bound: bool, part_of: int | None) -> None:
        if len(self.handles) >= 5:
            return
        parent = None if part_of is None else self.pick(part_of).id
        if parent is not None and not self.newest(parent).is_open:
            return
        handle = self.run(self.controllers[controller].begin(ask(part_of=parent, requested={"gpu": 1})))
        if bound:
            self.run(handle.bind("deployment", f"d{len(self.handles)}", owner="node"))
        self.handles.append(handle)

    @rule(number=st.integers(0, 9))
    def grant(self, number: int) -> None:
        handle = self.pick(number)
        if handle.record.bound is None:
            return
        try:
            self.run(handle.grant(Grant({"memory": "1GiB"})))
        except Violation:  # with others beyond what it is part of, or less than its own parts have
            assert handle.envelope.correlation.part_of is not None or self.parts(handle.id)

    @rule(
        controller=st.integers(0, 1),
        reviewer=st.sampled_from(["one", "two"]),
        said=st.lists(st.sampled_from(sorted(FINDINGS)), min_size=5, max_size=5),
    )
    def review(self, controller: int, reviewer: str, said: list[str]) -> None:
        before = {handle.id: self.newest(handle.id) for handle in self.handles}
        words = dict(zip(before, said, strict=False))
        found = self.run(self.controllers[controller].review([Says(reviewer, words)]))
        for id, record in before.items():
            after = self.newest(id)
            assert after.state == record.state  # whatever is said ends nothing
            if not record.is_open:
                assert after.next_sequence == record.next_sequence
            elif words[id] != "fails":
                verdict = words[id].split()[0]
                (self.wanted[id].add if verdict == "revoke" else self.wanted[id].discard)(reviewer)
                assert after.reviews[reviewer].data.verdict == verdict
            else:
                assert id in found.ids("failed") and after.reviews == record.reviews

    @rule(controller=st.integers(0, 1), number=st.integers(0, 9), who=st.sampled_from(sorted(PEOPLE)))
    def revoke(self, controller: int, number: int, who: str) -> None:
        id = self.pick(number).id
        before = self.newest(id)
        try:
            self.run(self.controllers[controller].revoke(id, by=PEOPLE[who], reason="it leaks"))
        except NotLive:
            assert not before.is_open
            return
        assert before.is_open
        new = self.newest(id).next_sequence - before.next_sequence
        assert new == (f"user:{who}" not in self.wanted[id])
        self.wanted[id].add(f"user:{who}")

    @rule(controller=st.integers(0, 1), answers=st.lists(st.sampled_from(sorted(ANSWERS)), min_size=5, max_size=5))
    def carry_out(self, controller: int, answers: list[str]) -> None:
        before = {handle.id: self.newest(handle.id) for handle in self.handles}
        asked: list[str] = []
        words = dict(zip(before, answers, strict=False))

        async def owner(record: Record, why: str) -> Stop:
            asked.append(record.id)
            answer = ANSWERS[words[record.id]]
            if answer is None:
                raise OSError("no route")
            if answer.status == "stopped":
                self.gone.add(record.id)
            return answer

        found = self.run(self.controllers[controller].carry_out({"node": owner}))
        assert len(asked) == len(set(asked))  # nobody is asked twice in a round
        confirmed = {id for id, _ in found.revoked}
        for id, record in before.items():
            after = self.newest(id)
            for reviewer, event in after.reviews.items():
                if reviewer.startswith(PART_OF):
                    keep = event.data.verdict == "keep"
                    (self.wanted[id].discard if keep else self.wanted[id].add)(reviewer)
            if id in asked and words[id] == "stopped":
                assert record.is_open and after.state == "revoked" and id in confirmed
            else:
                assert after.state == record.state and id not in confirmed
            # A part is asked for whenever what it is part of is.
            if id in asked and record.envelope.correlation.part_of in asked:
                assert asked.index(id) < asked.index(record.envelope.correlation.part_of)

    @rule(number=st.integers(0, 9), how=st.sampled_from(sorted(ENDS)))
    def end(self, number: int, how: str) -> None:
        handle = self.pick(number)
        before = self.newest(handle.id)
        if how == "complete" and before.is_open and self.open_parts(handle.id):
            return
        asked = any(isinstance(e.data, Review) and e.data.verdict == "revoke" for e in before.events)
        try:
            self.run(ENDS[how](handle))
        except NotLive:
            assert how == "confirm" and not asked
            return
        after = self.newest(handle.id)
        if how == "confirm":
            assert asked
            self.gone.add(handle.id)
        if before.is_open:
            assert after.state == {"complete": "completed", "cancel": "cancelled", "confirm": "revoked"}[how]
        else:
            assert after.state == before.state

    @rule(controller=st.integers(0, 1), gone=st.lists(st.booleans(), min_size=5, max_size=5))
    def reconcile(self, controller: int, gone: list[bool]) -> None:
        before = {handle.id: self.newest(handle.id) for handle in self.handles}
        words = dict(zip(before, gone, strict=False))

        async def prober(record: Record) -> Liveness:
            return Liveness.gone("not there") if words[record.id] else Liveness.alive("there")

        self.run(self.controllers[controller].reconcile({"node": prober}, everything=True))
        for id, record in before.items():
            after = self.newest(id)
            if record.is_open and record.bound is not None and words[id]:
                self.gone.add(id)
                assert after.state == ("revoked" if record.revoking else "abandoned")
            else:
                assert after.state == record.state

    def parts(self, id: str) -> list[str]:
        return [handle.id for handle in self.handles if handle.envelope.correlation.part_of == id]

    def open_parts(self, id: str) -> bool:
        return any(self.newest(part).is_open or self.open_parts(part) for part in self.parts(id))

    @invariant()
    def what_must_hold(self) -> None:
        revoking = set()
        for handle in getattr(self, "handles", ()):
            record = self.newest(handle.id)
            assert sum(ended(event.data) for event in record.events) == (not record.is_open)
            reviews = [event for event in record.events if isinstance(event.data, Review)]
            if record.state == "revoked":
                end = next(event for event in record.events if isinstance(event.data, Revoked))
                asked = [e for e in reviews if e.data.verdict == "revoke" and e.sequence < end.sequence]  # type: ignore[union-attr]
                assert asked and record.id in self.gone
                assert all(isinstance(e.data, Late) for e in record.events[end.sequence + 1 :])
            for one, two in pairwise(reviews):
                assert one.data != two.data  # no change, no event
            answers = [event.data for event in record.events if isinstance(event.data, Revocation | Review)]
            for first, second in pairwise(answers):
                assert first != second
            if record.is_open:
                assert (record.revoking is not None) == bool(self.wanted[record.id])
                if record.revoking is not None:
                    revoking.add(record.id)
            else:
                assert record.revoking is record.flagged is None
        if hasattr(self, "ledger"):
            found = self.ledger.projection().coverage(100).of["revoking"]
            assert (set(found.newest), found.count) == (revoking, len(revoking))

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            assert verify(self.ledger).findings == ()
            held = sum(balance.reserved for balance in self.ledger.balances())
            assert held == 1000 * sum(self.newest(handle.id).is_open for handle in self.handles)
            for controller in self.controllers:
                self.run(controller.aclose())
            self.loop.close()


class ReviewedOnSqlite(Reviewed):
    def make_ledger(self) -> Ledger:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        return SqliteLedger(Path(self.folder.name) / "ledger.db")

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestReviewedInMemory = Reviewed.TestCase
TestReviewedInMemory.settings = settings(
    max_examples=examples(30), stateful_step_count=30, deadline=None, print_blob=True
)
TestReviewedOnSqlite = ReviewedOnSqlite.TestCase
TestReviewedOnSqlite.settings = settings(
    max_examples=examples(8), stateful_step_count=25, deadline=None, print_blob=True
)

"""The lifecycle: a closed table, and no sequence of calls by any number of handles that leads outside of it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from execution_envelope import (
    Admission,
    AdmissionController,
    Candidate,
    Decision,
    Duty,
    Grant,
    IllegalTransition,
    InvalidField,
    Record,
    Rule,
)
from execution_envelope.envelope import seal
from execution_envelope.errors import Denied, EnvelopeError, Held, KeyConflict, ReadOnly, ReferenceTaken
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, verify
from execution_envelope.lifecycle import (
    ASKED,
    NOTES,
    OPEN,
    TERMINAL,
    TRANSITIONS,
    Admitted,
    Event,
    EventData,
    Fact,
    Granted,
    Late,
    Rejected,
    Released,
    Used,
    Violation,
    ended,
    legal_from,
    next_state,
)
from execution_envelope.testing import START, ask
from tests import strategies
from tests.strategies import examples

assert strategies  # it loads the settings
TYPES = {str(data.__struct_config__.tag): data for data in get_args(EventData)}


def test_every_state_has_its_rows() -> None:
    states = {ASKED} | OPEN | TERMINAL
    assert set(TRANSITIONS) == set(NOTES) == states
    assert {state for after in TRANSITIONS.values() for state in after} == states - {ASKED}
    assert not (OPEN & TERMINAL)


def test_every_event_type_is_in_the_table_and_the_table_knows_no_other() -> None:
    in_table = {name for rows in (TRANSITIONS, NOTES) for names in rows.values() for name in names}
    assert in_table == set(TYPES)


def test_an_event_either_changes_the_state_or_is_a_note() -> None:
    for state in TRANSITIONS:
        assert not (TRANSITIONS[state] & NOTES[state])
    changing = set().union(*TRANSITIONS.values())
    assert not changing & set().union(*NOTES.values())


def test_the_end_is_final() -> None:
    for state in TERMINAL:
        assert TRANSITIONS[state] == frozenset() and NOTES[state] == {"late"}
    reachable = {ASKED}
    for _ in TRANSITIONS:
        reachable |= {after for state in reachable for after in TRANSITIONS[state]}
    assert reachable == set(TRANSITIONS)


def sample(kind: type[msgspec.Struct]) -> EventData:
    """Some event data of this type: text where text is needed."""
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if field.required:
            known = {"candidates": (), "resources": {}, "entries": (), "fact": Rejected("c", "m")}
            fields[field.name] = known.get(field.name, "x")
    return kind(**fields)  # type: ignore[return-value]


@pytest.mark.parametrize("state", sorted(TRANSITIONS))
@pytest.mark.parametrize("name", sorted(TYPES))
def test_code_is_drawn_from_the_table(state: str, name: str) -> None:
    data = sample(TYPES[name])
    after = next_state(state, data)
    assert after == (name if name in TRANSITIONS[state] else state if name in NOTES[state] else None)
    assert (name in legal_from(state)) is (after is not None)
    assert ended(data) is (name in TERMINAL)
    record = Record(seal(ask(), id="x", now=START).envelope)
    record.state = state
    event = Event("x", 0, "", "test", data)
    if after is None:
        with pytest.raises(IllegalTransition, match=f"in state {state}, got `{name}`") as refused:
            record.apply(event)
        assert (refused.value.state, refused.value.event, record.events) == (state, name, [])
    else:
        record.apply(event)
        assert record.state == after


#: A call on a handle -> the type of the event that it records.
CALLS: dict[str, tuple[str, Any]] = {
    "grant whole": ("granted", lambda a: a.grant(Grant({"gpu": 1, "memory": "1GiB"}))),
    "grant part 0": ("granted", lambda a: a.grant(Grant({"gpu": 1}, part="0", honoured=["engine"]))),
    "grant part 1": (
        "granted",
        lambda a: a.grant(Grant({"gpu": 0.5}, part="1", because={"gpu": ("capacity", "full")})),
    ),
    "release whole": ("released", lambda a: a.release()),
    "release part 0": ("released", lambda a: a.release("0", reason="scaled down")),
    "release part 1": ("released", lambda a: a.release("1")),
    "effective": ("effective", lambda a: a.effective({"gpu": 1}, cause="policy", because="one each")),
    "attempt": ("attempt", lambda a: a.attempt([Candidate("n1", "refused", "full")], reason="no room")),
    "ready": ("ready", lambda a: a.ready("0")),
    "used": ("used", lambda a: a.used({"steps": 1, "gpu": 1}, part="0")),
    "used again": ("used", lambda a: a.used({"steps": 1}, key="report-1")),
    "oblige": ("obligation", lambda a: a.oblige("note", "acknowledged", "seen")),
    "reject": ("rejected", lambda a: a.reject("NoRoom", "no room")),
    "complete": ("completed", lambda a: a.complete()),
    "fail": ("failed", lambda a: a.fail("Crash", "it crashed")),
    "cancel": ("cancelled", lambda a: a.cancel()),
}


MOODS = {
    "allow": Decision.allow(obligations=[Duty("note", required=False)]),
    "hold": Decision.hold("somebody has to look"),
    "deny": Decision.deny("capacity", "not now"),
}


class Handles(RuleBasedStateMachine):
    """Several handles of a few envelopes, each as stale as chance makes it, on one ledger."""

    def make_ledger(self) -> Ledger:
        return MemoryLedger()

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.ledger = self.make_ledger()
        self.mood = "allow"
        self.controller = AdmissionController(self.ledger, hooks=[Rule("mood", lambda _: MOODS[self.mood])])
        self.handles: list[Admission] = []
        self.ids: list[str] = []
        self.admit(None)

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(step)

    def newest(self, id: str) -> Record:
        record: Record = self.run(self.controller.read(id))
        return record

    def pick(self, number: int) -> Admission:
        return self.handles[number % len(self.handles)]

    @rule(key=st.none() | st.sampled_from(["k1", "k2"]))
    def admit(self, key: str | None) -> None:
        if len(self.ids) >= 4 and key is None:
            return
        known = {self.newest(id).envelope.correlation.idempotency_key: id for id in self.ids}
        try:
            admission = self.run(self.controller.begin(ask(idempotency_key=key)))
        except (Denied, Held) as refused:
            record = self.newest(str(refused.envelope_id))
            # One that was held and is not wanted any more is refused for good under its key.
            withdrawn = record.state == "cancelled" and record.hold is not None and record.id in self.ids
            assert record.state == refused.type or (withdrawn and isinstance(refused, Denied))
            if record.id in self.ids:
                # Sent again: what was denied stays denied whatever the decider says now, what is held was asked again.
                assert record.id == known[key] and (isinstance(refused, Denied) or self.mood == "hold")
            else:
                assert refused.type == {"hold": "held", "deny": "denied"}[self.mood]
                self.ids.append(record.id)
            return
        except KeyConflict as conflict:
            record = self.newest(known[key])
            assert conflict.retryable and record.is_open and record.bound is None
            return
        if admission.replayed:
            assert admission.id == known[key]
            for forbidden in (admission.complete(), admission.grant(Grant({"gpu": 1})), admission.ready()):
                with pytest.raises(ReadOnly):
                    self.run(forbidden)
            before = self.newest(admission.id)
            self.run(admission.leave())
            assert self.newest(admission.id).events == before.events
        else:
            assert self.mood == "allow" and admission.state == "admitted"
            # Under a key that was held it is the same envelope, admitted now.
            assert (admission.id in self.ids) is (key is not None and known.get(key) == admission.id)
            self.ids += [admission.id] if admission.id not in self.ids else []
            self.handles.append(admission)

    @rule(mood=st.sampled_from(sorted(MOODS)))
    def decide(self, mood: str) -> None:
        self.mood = mood

    @rule(number=st.integers(0, 30))
    def resume(self, number: int) -> None:
        if len(self.handles) < 12:
            id = self.ids[number % len(self.ids)]
            self.handles.append(self.run(self.controller.resume(id, by="node")))

    @rule(number=st.integers(0, 30), call=st.sampled_from(sorted(CALLS)))
    def say(self, number: int, call: str) -> None:
        admission = self.pick(number)
        before = self.newest(admission.id)
        kind, said = CALLS[call]
        legal = kind in TRANSITIONS[before.state] or kind in NOTES[before.state]
        try:
            self.run(said(admission))
        except IllegalTransition as refused:
            assert before.is_open and not legal
            assert (refused.state, refused.event) == (before.state, kind)
            assert self.newest(admission.id).events == before.events
            return
        except InvalidField:
            assert kind == "obligation" and before.obligations == {}  # it was never admitted
            return
        after = self.newest(admission.id)
        found = after.events[len(before.events) :]
        if not found:
            # It said nothing new of how things are.
            assert kind in ("granted", "released", "effective", "ready")
            assert kind == "released" or any(event.data.type == kind for event in before.events)
            assert before.is_open
            return
        [new] = found
        if before.is_open:
            assert legal and new.data.type == kind
            assert after.state == (kind if kind in TRANSITIONS[before.state] else before.state)
        else:
            assert isinstance(new.data, Late) and new.data.fact.type == kind
            assert after.state == before.state
            assert after.granted == before.granted and after.held == {}
        assert admission.record.events == after.events

    @rule(number=st.integers(0, 30), reference=st.sampled_from(["d1", "d2"]))
    def bind(self, number: int, reference: str) -> None:
        admission = self.pick(number)
        before = self.newest(admission.id)
        try:
            self.run(admission.bind("deployment", reference))
        except ReferenceTaken:
            assert self.run(self.controller.read("deployment", reference)).id != admission.id
            assert self.newest(admission.id).events == before.events
            return
        except IllegalTransition:
            assert before.state == "held"
            return
        if before.is_open:
            assert self.run(self.controller.read("deployment", reference)).id == admission.id

    @rule(number=st.integers(0, 30), how=st.sampled_from(["well", "badly", "cancelled"]))
    def leave(self, number: int, how: str) -> None:
        admission = self.pick(number)
        before = self.newest(admission.id)
        if before.state == "held":
            return
        options: dict[str, Any] = {"badly": {"failed": ("ValueError", "x")}, "cancelled": {"cancelled": "gone"}}.get(
            how, {}
        )
        self.run(admission.leave(**options))
        after = self.newest(admission.id)
        if not before.is_open or (before.bound is not None and how == "well"):
            assert after.events == before.events
        elif before.bound is not None:
            assert after.state == before.state and after.events[-1].data.type == "error"
        else:
            ends = {"well": "completed", "cancelled": "cancelled", "badly": "failed" if before.grants else "rejected"}
            assert after.state == ends[how]
            assert after.ungranted is (how == "well" and not before.grants)

    @invariant()
    def every_history_is_legal(self) -> None:
        for id in getattr(self, "ids", ()):
            record = self.newest(id)
            assert [event.sequence for event in record.events] == list(range(len(record.events)))
            assert sum(ended(event.data) for event in record.events) == (not record.is_open)
            again = Record(record.envelope, record.events)
            assert facts_of(again) == facts_of(record)
            assert not any(isinstance(event.data, Violation) for event in record.events)
        for admission in getattr(self, "handles", ()):
            seen, newest = admission.record.events, self.newest(admission.id).events
            assert newest[: len(seen)] == seen

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            assert verify(self.ledger).findings == ()
            open_ids = [id for id in self.ids if self.newest(id).is_open]
            assert self.ledger.unfinished() == sorted(open_ids)
            self.run(self.controller.aclose())
            self.loop.close()


def facts_of(record: Record) -> dict[str, Any]:
    """Everything a record derives, by name."""
    return {
        name: getattr(record, name)
        for name, value in vars(Record).items()
        if isinstance(value, property) and not name.startswith("_")
    } | {"state": record.state}


class HandlesOnSqlite(Handles):
    def make_ledger(self) -> Ledger:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        return SqliteLedger(Path(self.folder.name) / "ledger.db")

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestHandlesInMemory = Handles.TestCase
TestHandlesInMemory.settings = settings(
    max_examples=examples(60), stateful_step_count=40, deadline=None, print_blob=True
)
TestHandlesOnSqlite = HandlesOnSqlite.TestCase
TestHandlesOnSqlite.settings = settings(
    max_examples=examples(12), stateful_step_count=30, deadline=None, print_blob=True
)


def record_of(*facts: EventData) -> Record:
    """The record of an admitted envelope to which these facts happened."""
    record = Record(seal(ask(), id="x", now=START).envelope)
    for number, fact in enumerate([Admitted(), *facts]):
        record.apply(Event("x", number, "", "test", fact))
    return record


def gpus(amount: int, part: str | None = None) -> Granted:
    return Grant({"gpu": amount}, part=part).fact()


@pytest.mark.parametrize(
    ("facts", "held"),
    [
        ([gpus(4), gpus(1, "0")], {"0": 1000}),
        ([gpus(4), gpus(1, "0"), gpus(2, "1")], {"0": 1000, "1": 2000}),
        ([gpus(1, "0"), gpus(2, "1"), gpus(4)], {"": 4000}),
        ([gpus(4), gpus(3)], {"": 3000}),
        ([gpus(4), Released()], {}),
        ([gpus(4), Released(), gpus(1, "0")], {"0": 1000}),
        ([gpus(4), gpus(1, "0"), Released()], {}),
        ([gpus(1, "0"), gpus(2, "1"), Released("0")], {"1": 2000}),
        ([gpus(1, "0"), gpus(2, "1"), Released()], {}),
        ([gpus(1, "0"), gpus(2, "1"), Released(), gpus(1, "1")], {"1": 1000}),
        ([gpus(4), Released("0")], {"": 4000}),
        ([gpus(1, "0"), Released("0"), gpus(4), gpus(2, "1")], {"1": 2000}),
    ],
)
def test_the_whole_and_its_parts_never_count_side_by_side(facts: list[EventData], held: dict[str, int]) -> None:
    record = record_of(*facts)
    assert {part: grant.resources["gpu"].amount for part, grant in record.holding.items()} == held
    assert record.held.get("gpu", 0) == sum(held.values())
    # What would be held is what is held once it was granted.
    last = facts[-1]
    if isinstance(last, Granted):
        assert record_of(*facts[:-1]).with_grant(last) == record.held == record.granted


def test_a_report_counts_once_for_each_part() -> None:
    record = record_of(
        Used({"steps": 1}, part="0", key="r1"),
        Used({"steps": 2}, part="1", key="r1"),
        Used({"steps": 4}, part="1", key="r1"),
        Used({"steps": 8}, key="r1"),
        Used({"steps": 16}, part="0"),
    )
    assert record.used["steps"].amount == 1 + 2 + 8 + 16


def test_the_calls_cover_what_a_handle_may_say() -> None:
    said = {kind for kind, _ in CALLS.values()}
    by_others = {"sealed", "verdict", "admitted", "held", "denied", "limit", "violation", "bound", "error", "late"}
    by_others |= {"approval", "budgeted", "observed", "reported", "review", "revocation"}
    by_the_backend = {"expired", "revoked", "abandoned"}
    assert said | by_others | by_the_backend == set(TYPES)
    assert issubclass(IllegalTransition, EnvelopeError) and Fact

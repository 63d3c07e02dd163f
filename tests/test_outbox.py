"""The relay: order of each envelope over chains of several processes, at least once, and sinks that fail."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_structured
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope.envelope import SealedEnvelope, seal
from execution_envelope.errors import Damaged, InvalidField
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger
from execution_envelope.ledger.chain import Chain, Link
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.contract import ChainHead, Row
from execution_envelope.lifecycle import Admitted, Denied, Event, EventData, Ready, Sealed, Verdict
from execution_envelope.process import current
from execution_envelope.telemetry import ordered_log, outbox
from execution_envelope.telemetry.cloudevents import ATTRIBUTES, DATA, CloudEvents, Message
from execution_envelope.telemetry.ordered_log import OrderedLog
from execution_envelope.telemetry.outbox import COUNTERS, Refused, Relay, Unavailable
from execution_envelope.testing import START, ask

AT = "2026-05-01T12:00:00.000000Z"
SECRET = "sk-ant-" + "a1b2" * 8
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sealed(id: str, **overrides: Any) -> SealedEnvelope:
    return seal(ask(**overrides), id=id, now=START)


def commit(id: str, sequence: int, *facts: EventData) -> Commit:
    if sequence == 0:
        whole = sealed(id)
        facts = (Sealed(whole.digest, whole.request_digest), *(facts or (Admitted(),)))
        return Commit(id, 0, AT, "b", facts, sealed=whole)
    return Commit(id, sequence, AT, "b", facts or (Ready(str(sequence)),))


class Received:
    """A sink that keeps what it was sent; it can be made to fail, once for each entry of `failures`."""

    def __init__(self, failures: Sequence[Exception | None] = ()) -> None:
        self.messages: list[Message] = []
        self.failures = list(failures)
        self.under_way: Counter[str] = Counter()
        self.most_at_once = 0

    async def send(self, message: Message) -> bool:
        self.under_way[message.envelope] += 1
        assert self.under_way[message.envelope] == 1
        self.most_at_once = max(self.most_at_once, self.under_way.total())
        try:
            await anyio.sleep(0.001)
        finally:
            self.under_way[message.envelope] -= 1
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        known = message.id in {before.id for before in self.messages}
        self.messages.append(message)
        return known

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self.messages]


def in_order(ids: Sequence[str]) -> bool:
    """Of each envelope from 0 on, without a gap."""
    of: dict[str, list[int]] = {}
    for id in ids:
        envelope, _, sequence = id.partition("/")
        of.setdefault(envelope, []).append(int(sequence))
    return all(sequences == list(range(len(sequences))) for sequences in of.values())


class Chains:
    """The part of a ledger that is read, with chains as the test wants them: what several processes wrote."""

    def __init__(self, chains: int) -> None:
        self.links: list[list[Link]] = []
        self.chains_ = [Chain(f"c-{n}") for n in range(chains)]
        for chain in self.chains_:
            opening = chain.opening(AT, current(), "1")
            chain.advance([opening])
            self.links.append([opening])
        self.places: dict[str, list[tuple[int, int]]] = {}
        self.bodies: dict[str, bytes] = {}
        self.cursors: dict[str, dict[str, int]] = {}
        self.reads = 0

    def write(self, chain: int, id: str) -> None:
        places = self.places.setdefault(id, [])
        fact: EventData = Ready(str(len(places)))
        if not places:
            whole = sealed(id)
            self.bodies[id] = whole.body
            fact = Sealed(whole.digest, whole.request_digest)
        [link] = self.chains_[chain].link([Event(id, len(places), AT, "b", fact)])
        self.chains_[chain].advance([link])
        places.append((chain, len(self.links[chain])))
        self.links[chain].append(link)

    def chains(self) -> list[ChainHead]:
        return [ChainHead(n, f"c-{n}", len(links), links[-1].hash) for n, links in enumerate(self.links)]

    def rows(self, chain: str, *, after: int = -1, until: int | None = None) -> Iterator[Row]:
        self.reads += 1
        number = int(chain[2:])
        for position, _ in list(enumerate(self.links[number]))[after + 1 : None if until is None else until + 1]:
            yield self._row(number, position)

    def rows_of(self, envelope: str) -> Iterator[Row]:
        self.reads += 1
        for place in self.places[envelope]:
            yield self._row(*place)

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        return f"c-{self.places[envelope][sequence][0]}"

    def cursor(self, consumer: str) -> dict[str, int]:
        return dict(self.cursors.get(consumer, {}))

    def move_cursor(self, consumer: str, positions: dict[str, int]) -> None:
        self.cursors.setdefault(consumer, {}).update(positions)

    def _row(self, chain: int, position: int) -> Row:
        link = self.links[chain][position]
        first = link.entry.sequence == 0
        return Row(
            f"c-{chain}", position, link.body, link.hash, self.bodies[link.entry.envelope or ""] if first else None
        )


def all_of(ledger: Any, taken: dict[str, int] | None = None) -> tuple[list[str], Counter[str]]:
    counters = Counter[str]()
    log = OrderedLog(ledger, counters)
    log.snapshot(taken or {})
    return [f"{event.envelope}/{event.sequence}" for event, _ in log.events()], counters


# The order


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcde")), max_size=60),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_the_order_of_each_envelope_holds_over_all_chains_whatever_is_taken_in_at_once(
    writes: list[tuple[int, str]], size: int, dice: random.Random
) -> None:
    """Writes of four processes; the consumer stops somewhere, again and again, and begins anew from its cursor."""
    ledger = Chains(4)
    sent: list[str] = []
    taken: dict[str, int] = {}
    for chain, id in writes:
        ledger.write(chain, id)
        if dice.random() < 0.2:
            log = OrderedLog(ledger, Counter())  # type: ignore[arg-type]
            log.snapshot(taken)
            for event, _ in log.events():
                sent.append(f"{event.envelope}/{event.sequence}")
                if len(sent) % size == 0:
                    break
            taken = dict(log.taken)
    rest, counters = all_of(ledger, taken)
    sent += rest
    assert in_order(sent)
    assert len(sent) == len(set(sent)) == len(writes)
    assert not +counters


def test_an_envelope_that_two_processes_write_in_turns_is_read_once() -> None:
    ledger = Chains(2)
    for n in range(2000):
        ledger.write(n % 2, "e")
    ids, _ = all_of(ledger)
    assert len(ids) == 2000
    assert in_order(ids)
    # Two chains in pages, and once the envelope itself.
    assert ledger.reads <= 2 * (2000 / ordered_log.PAGE + 3)


def test_what_memory_forgets_is_looked_for_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_log, "MAX_REMEMBERED", 1)
    monkeypatch.setattr(ordered_log, "MAX_PLACED", 1)
    monkeypatch.setattr(ordered_log, "MAX_PAGES", 1)
    monkeypatch.setattr(ordered_log, "PAGE", 3)
    ledger, dice = Chains(5), random.Random(1)
    for _ in range(200):
        ledger.write(dice.randrange(5), dice.choice("abcdef"))
    ids, counters = all_of(ledger)
    assert in_order(ids)
    assert (len(ids), counters.total()) == (200, 0)


def test_a_head_that_was_looked_at_before_its_chain_grew_is_no_reason_to_break_the_order() -> None:
    """Heads are read one after the other: the second shows an event, the first did not yet show the one before it."""
    ledger = Chains(2)
    ledger.write(0, "e")
    stale = ledger.chains()[0]
    ledger.write(0, "e")
    ledger.write(1, "e")
    ledger.write(1, "f")
    heads = [stale, ledger.chains()[1]]
    log = OrderedLog(ledger, Counter())  # type: ignore[arg-type]
    ledger.chains, whole = lambda: heads, ledger.chains  # type: ignore[method-assign]
    log.snapshot({})
    assert [f"{e.envelope}/{e.sequence}" for e, _ in log.events()] == ["e/0"]
    ledger.chains = whole  # type: ignore[method-assign]
    log.snapshot(log.taken)
    assert [f"{e.envelope}/{e.sequence}" for e, _ in log.events()] == ["e/1", "e/2", "f/0"]


def test_what_was_read_and_not_sent_keeps_its_order_when_it_is_read_again() -> None:
    """A batch is interrupted, and the same log begins anew behind what was sent: it came no further than that."""
    ledger = Chains(2)
    for chain in (0, 1, 0, 1):
        ledger.write(chain, "e")
    log = OrderedLog(ledger, Counter())  # type: ignore[arg-type]
    log.snapshot({})
    assert len(list(log.events())) == 4
    # Chain 1 is read first now, and holds what comes after the first event of chain 0.
    heads = list(reversed(ledger.chains()))
    ledger.chains = lambda: heads  # type: ignore[method-assign]
    log.snapshot({})
    assert [f"{e.envelope}/{e.sequence}" for e, _ in log.events()] == ["e/0", "e/1", "e/2", "e/3"]


def test_chains_that_wait_for_each_other_were_changed_and_are_not_waited_for() -> None:
    ledger = Chains(2)
    ledger.write(0, "a")
    ledger.write(1, "b")
    ledger.write(1, "a")
    ledger.write(0, "b")
    # Somebody swapped entries of both chains.
    for chain in range(2):
        ledger.links[chain][1:3] = reversed(ledger.links[chain][1:3])
    ledger.places = {"a": [(0, 2), (1, 1)], "b": [(1, 2), (0, 1)]}
    with pytest.raises(Damaged):
        all_of(ledger)


def test_entries_that_are_gone_or_unreadable_are_counted_and_hold_up_nothing() -> None:
    ledger = Chains(2)
    for _ in range(3):
        ledger.write(0, "a")
        ledger.write(1, "b")
    link = ledger.links[0][2]
    ledger.links[0][2] = Link(link.entry, b"{", link.hash)
    heads, ledger.links[1] = ledger.chains(), []
    ledger.chains = lambda: heads  # type: ignore[method-assign]
    ids, counters = all_of(ledger)
    assert ids == ["a/0", "a/2"]
    assert counters == {"unreadable": 1, "missing": 4}


# The relay


def fill(ledger: Ledger, envelopes: int = 3, events: int = 3) -> list[str]:
    for sequence in range(events):
        for n in range(envelopes):
            ledger.commit(commit(f"e-{n}", 0 if sequence == 0 else sequence + 1))
    return [f"e-{n}/{sequence}" for n in range(envelopes) for sequence in range(events + 1)]


@pytest.mark.anyio
async def test_every_event_is_sent_once_and_then_only_what_is_new(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "l.db")
    try:
        ids = fill(ledger)
        sink = Received()
        assert await Relay(ledger, sink, consumer="c").catch_up() == len(ids)
        assert sorted(sink.ids) == ids
        assert in_order(sink.ids)
        assert sink.most_at_once == 3  # side by side, each envelope one after the other
        again = Relay(ledger, sink, consumer="c")
        assert await again.lag() == 0
        assert await again.catch_up() == 0
        ledger.commit(commit("e-1", 4))
        assert await again.catch_up() == 1
        assert sink.ids[-1] == "e-1/4"
        assert await Relay(ledger, Received(), consumer="other").catch_up() == len(ids) + 1
    finally:
        ledger.close()


@pytest.mark.anyio
async def test_two_processes_that_write_in_turns_are_one_order(tmp_path: Path) -> None:
    ledgers = [SqliteLedger(tmp_path / "l.db") for _ in range(2)]
    try:
        for n in range(40):
            id, sequence = f"e-{n % 3}", n // 3
            ledgers[n % 2].commit(commit(id, 0 if sequence == 0 else sequence + 1))
        assert len({head.id for head in ledgers[0].chains()}) == 2
        sink = Received()
        await Relay(ledgers[0], sink, consumer="c").catch_up()
        assert in_order(sink.ids)
        assert len(sink.ids) == 43
    finally:
        for ledger in ledgers:
            ledger.close()


@pytest.mark.anyio
async def test_the_cursor_stays_behind_what_was_not_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BATCH", 4)
    ledger = MemoryLedger()
    ids = fill(ledger)
    sink = Received()
    sink.failures = [None] * 6 + [RuntimeError("killed")]
    with pytest.raises(RuntimeError, match="killed"):
        await Relay(ledger, sink, consumer="c").catch_up()
    before = list(sink.ids)
    assert len(before) < len(ids)
    await Relay(ledger, sink, consumer="c").catch_up()
    assert sorted(set(sink.ids)) == ids
    # At least once; what is sent again is in the batch that was under way, and in order.
    again = [id for id in sink.ids[len(before) :] if id in before]
    assert again and set(again) <= set(before[4:])
    first = list(dict.fromkeys(sink.ids))
    assert in_order(first)


@pytest.mark.anyio
async def test_what_is_not_taken_is_sent_again_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    real = anyio.sleep

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        await real(0)

    ledger = MemoryLedger()
    ledger.commit(commit("e", 0))
    sink = Received([Unavailable(f"no: {SECRET}")] * 12 + [Unavailable("later", delay=100.0)])
    said: list[str | None] = []
    relay = Relay(ledger, sink, consumer="c", trouble=said.append)
    monkeypatch.setattr(outbox.anyio, "sleep", sleep)
    assert await relay.catch_up() == 2
    waited = [seconds for seconds in delays if seconds > 0.01]  # the rest is the sink's own
    assert sink.ids == ["e/0", "e/1"]
    assert said == ["no: [redacted:anthropic]", None]
    assert relay.counters["retried"] == 13
    assert all(0.5 * low <= seconds <= low for seconds, low in zip(waited, [0.1, 0.2, 0.4, 0.8], strict=False))
    assert max(waited[:12]) <= outbox.MAX_DELAY
    assert waited[12] == 100.0


@pytest.mark.anyio
async def test_what_is_refused_for_good_is_parked_or_ends_it(tmp_path: Path) -> None:
    ledger = MemoryLedger()
    for n in range(2):
        ledger.commit(commit("e", n and n + 1))
    sink, parked = Received([None, Refused("too large")]), list[tuple[str, str]]()
    relay = Relay(ledger, sink, consumer="c", park=lambda message, why: parked.append((message.id, why)))
    await relay.catch_up()
    assert (sink.ids, parked) == (["e/0", "e/2"], [("e/1", "too large")])
    assert +relay.counters == {"sent": 2, "parked": 1}
    assert await relay.catch_up() == 0
    for _ in range(2):  # it comes to the same event again
        with pytest.raises(Refused, match="e/1: too large"):
            await Relay(ledger, Received([None, Refused("too large")]), consumer="other").catch_up()


@pytest.mark.parametrize("consumer", ["", "x" * 257, None])
def test_a_consumer_has_a_name(consumer: Any) -> None:
    with pytest.raises(InvalidField, match="consumer"):
        Relay(MemoryLedger(), Received(), consumer=consumer)


# CloudEvents


def made(event: Event, whole: SealedEnvelope, **options: Any) -> Any:
    message = CloudEvents(**options).message(event, whole.envelope)
    http = HTTPMessage({"content-type": "application/cloudevents+json"}, message.body)
    return from_structured(http, JSONFormat())


def test_an_event_is_a_cloud_event_that_others_can_read() -> None:
    whole = sealed("e", traceparent=TRACE, tracestate="v=1")
    event = made(Event("e", 3, AT, "b", Denied("policy", f"because {SECRET}")), whole, source="urn:ledger:eu")
    assert event.get_attributes() == {
        "specversion": "1.0",
        "id": "e/3",
        "source": "urn:ledger:eu",
        "type": "io.execution-envelope.denied",
        "subject": "e",
        "time": START,
        "datacontenttype": "application/json",
        "partitionkey": "e",
        "sequence": "0000000003",
        "traceparent": TRACE,
        "tracestate": "v=1",
    }
    assert event.get_data() == {
        "envelope_id": "e",
        "sequence": 3,
        "at": AT,
        "by": "b",
        "event_type": "denied",
        "kind": "model.deploy",
        "event": {"type": "denied", "code": "policy", "message": "because [redacted:anthropic]"},
        "redacted": ["event.message"],
    }


def test_the_sealed_envelope_is_in_the_first_event_and_what_a_rule_names_is_not() -> None:
    whole = sealed("e")
    event = made(Event("e", 0, AT, "b", Sealed("d", "r")), whole, redact=["envelope.identity.subject.id"])
    assert event.get_data()["envelope"]["identity"]["subject"] == {"type": "user", "id": "[redacted:field]"}
    assert event.get_data()["redacted"] == ["envelope.identity.subject.id"]


def test_every_attribute_and_member_is_documented() -> None:
    whole = sealed("e", traceparent=TRACE, tracestate="v=1")
    facts = [Sealed("d", "r"), Verdict("h", "1", "deny", "policy", SECRET)]
    events = [made(Event("e", n, AT, "b", fact), whole) for n, fact in enumerate(facts)]
    assert {name for event in events for name in event.get_attributes()} == set(ATTRIBUTES)
    members = {name for event in events for name in event.get_data()}
    assert members == set(DATA) - {"redaction_failed"}
    page = (Path(__file__).parent.parent / "docs" / "reference" / "telemetry.md").read_text()
    for table in (ATTRIBUTES, DATA, COUNTERS):
        for name, meaning in table.items():
            assert f"| `{name}` | {meaning} |" in page


def test_the_relay_counts_nothing_that_is_not_documented() -> None:
    source = "".join(Path(module.__file__ or "").read_text() for module in (outbox, ordered_log))
    counted = set(re.findall(r'counters\["(\w+)"\]', source))
    assert counted == set(COUNTERS)


@pytest.mark.parametrize("source", ["", "a b", "ü", 3])
def test_a_source_is_a_uri(source: Any) -> None:
    with pytest.raises(InvalidField, match="source"):
        CloudEvents(source=source)


def test_a_parked_line_is_the_event_and_why(tmp_path: Path) -> None:
    from execution_envelope.cli_relay import _park

    message = CloudEvents().message(Event("e", 0, AT, "b", Sealed("d", "r")), sealed("e").envelope)
    for _ in range(2):
        _park(tmp_path / "parked", message, "too large")
    lines = [json.loads(line) for line in (tmp_path / "parked").read_text().splitlines()]
    assert [(line["id"], line["parked_because"]) for line in lines] == [("e/0", "too large")] * 2

"""Explanations: golden texts, a sentence for everything that can be on a record, and what must always hold of them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import anyio
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from execution_envelope import Subject, lifecycle, presentation
from execution_envelope.budgets import Balance
from execution_envelope.cli import cli
from execution_envelope.decision import CODES, OUTCOMES
from execution_envelope.delta import Outcome
from execution_envelope.envelope import KINDS, Target, seal
from execution_envelope.ledger import MemoryLedger, SqliteLedger
from execution_envelope.lifecycle import (
    BASES,
    CAUSES,
    NOTES,
    TRANSITIONS,
    Event,
    EventData,
    Granted,
    Late,
    Why,
)
from execution_envelope.record import Record
from execution_envelope.resources import VOCABULARY, Quantity
from execution_envelope.review.explain import (
    SECTIONS,
    SENTENCE_KINDS,
    Explanation,
    accounts,
    asking,
    explain,
    outcome,
    remedies,
    sections,
    wording,
)
from execution_envelope.review.explain.explanation import MAX_EVENTS, MAX_SENTENCES
from execution_envelope.reviewer import OPINIONS
from execution_envelope.testing import START, FakeClock, ask
from tests import strategies
from tests.explained import BEGUN, LOOKED, STORIES
from tests.test_lifecycle import Handles

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "corpus" / "explanations"
HOSTILE = 'none" (policy). It was granted in full. \x1b[31mred\x1b[0m \x9b31m \u202eevil\nnew line\x07 "quoted'
TYPES: dict[str, Any] = {str(data.__struct_config__.tag): data for data in get_args(EventData)}


def told(name: str) -> tuple[Record, Explanation]:
    """A story, and what is said of it."""

    async def tell() -> tuple[Record, Explanation]:
        ledger = MemoryLedger()
        id = await STORIES[name](ledger, FakeClock(BEGUN))
        stored = ledger.read(id)
        assert stored is not None
        record = stored.record()
        balances = [
            one for account, window in accounts(record) for one in ledger.balances(account=account, window=window)
        ]
        return record, explain(record, now=LOOKED, children=ledger.children(id), balances=balances)

    return anyio.run(tell)


def texts(said: Explanation) -> list[str]:
    return [sentence.text for section in said.sections for sentence in section.sentences]


def holds(record: Record, said: Explanation) -> None:
    """What is true of every explanation."""
    assert (said.envelope, said.state) == (record.id, record.state)
    assert [section.name for section in said.sections] == [
        name for name in SECTIONS if name in {section.name for section in said.sections}
    ]
    every = [sentence for section in said.sections for sentence in section.sentences]
    for sentence in every:
        assert sentence.text.isprintable() and sentence.text.endswith(".") and not sentence.text.endswith("..")
        assert " None" not in sentence.text and "None " not in sentence.text
        assert sentence.kind in SENTENCE_KINDS and len(sentence.events) <= MAX_EVENTS
        assert set(sentence.events) <= {event.sequence for event in record.events}
    full = any(sentence.kind == "more" for sentence in every)
    beyond_short = [s for section in said.sections if section.name != "short" for s in section.sentences]
    seen = {number for sentence in beyond_short for number in sentence.events}
    if not full and not any(len(sentence.events) == MAX_EVENTS for sentence in every):
        assert seen == {event.sequence for event in record.events}
    if not full:
        paths = sorted(f"{one.sort}s.{one.key}" for one in record.differences if one.outcome != "equal")
        assert sorted(sentence.keys[0] for sentence in every if sentence.kind == "difference") == paths
        equal = sorted(f"{one.sort}s.{one.key}" for one in record.differences if one.outcome == "equal")
        assert sorted(key for sentence in every if sentence.kind == "equal" for key in sentence.keys) == equal
    assert said.section("short") and said.section("asked") and said.section("change")


# Golden texts


@pytest.mark.parametrize("name", STORIES)
def test_what_is_said_of_a_story(name: str) -> None:
    record, said = told(name)
    holds(record, said)
    text = presentation.explanation_text(said, width=100) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("WRITE_EXPLANATIONS"):
        path.write_text(text)
    assert path.read_text() == text


def test_every_golden_text_has_its_story() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(STORIES)


@pytest.mark.parametrize("name", STORIES)
def test_the_beginning_of_a_history_is_explained_too(name: str) -> None:
    record, _ = told(name)
    for length in range(len(record.events) + 1):
        part = Record(record.envelope, record.events[:length])
        holds(part, explain(part, now=LOOKED))


@pytest.mark.parametrize(
    ("name", "section", "kind", "key", "said"),
    [
        ("kserve", "given", "difference", "constraints.pipeline_parallelism", "nobody said why"),
        ("kserve", "course", "used", "resources.gpu", "2 GPUs used of the 4 GPUs granted: 2 GPUs not used"),
        ("llm_d", "given", "difference", "resources.gpu", "modelservice-chart gave 1 GPU instead of 8 GPUs"),
        ("ray", "given", "difference", "resources.gpu", "ray-serve gave 3 GPUs, more than the 0.9 GPUs"),
    ],
)
def test_the_public_defects_are_plain(name: str, section: str, kind: str, key: str, said: str) -> None:
    _, explanation = told(name)
    [found] = [s for s in explanation.section(section) if s.kind == kind and key in s.keys]
    assert said in found.text and found.events and found.by
    assert kind != "difference" or "unstated" in found.codes


def test_what_stands_now_is_apart_and_only_where_it_is_given() -> None:
    record, said = told("no_budget")
    [now] = said.section("now")
    assert now.kind == "now" and now.keys == ("resources.gpu",) and "2 GPUs free" in now.text and now.events == ()
    assert explain(record, now=LOOKED).section("now") == ()
    assert [account for account, _ in accounts(record)] == ["gpus/acme"] * 3
    assert [window for _, window in accounts(record)] == ["now", "2026-11-27", "2026-11"]
    over = Balance("gpus/acme", "now", "gpu", 1000, 3000, 0, 2)
    [text] = [sentence.text for sentence in explain(record, now=LOOKED, balances=[over]).section("now")]
    assert "2 GPUs too much taken" in text and "of 2 executions the amount is not known" in text
    [text] = [sentence.text for sentence in explain(record, now=LOOKED, balances=[]).section("now")]
    assert "nothing reserved and nothing spent" in text


def test_time_passes() -> None:
    record, _ = told("approved")
    after = datetime(2026, 11, 27, 13, 30, tzinfo=UTC)
    said = " ".join(texts(explain(record, now=after)))
    assert "that has passed, and it holds again" in said and "somebody else would have to approve it" in said.lower()
    over = datetime(2026, 11, 29, tzinfo=UTC)
    assert "it waits until 28 November 2026 at 11:02 UTC, which has passed" in " ".join(
        texts(explain(record, now=over))
    )


# A sentence for everything


def test_the_tables_know_every_word() -> None:
    assert set(remedies.ADVICE) == set(CODES)
    assert set(remedies._CAUSES) == set(CAUSES)
    assert set(outcome.OUTCOMES) == set(get_args(Outcome)) - {"equal"}
    assert set(outcome._BASES) == set(BASES)
    assert set(sections._STATES) == set(TRANSITIONS)
    assert set(wording.NOUNS) == set(VOCABULARY)
    assert set(wording.ASKED_TO) == set(KINDS)
    assert set(asking._SAID) == set(OUTCOMES)
    assert set(outcome._VERDICTS) == set(OPINIONS)


def samples(kind: Any) -> Iterator[Any]:
    """Facts of a type: each choice of each field that is a choice, full and with as little as may be."""
    hints = get_type_hints(kind)
    required: dict[str, list[Any]] = {}
    optional: dict[str, list[Any]] = {}
    for field in msgspec.structs.fields(kind):
        into = required if field.required else optional
        into[field.name] = _values(field.name, hints[field.name])
    for chosen in product(*required.values()):
        yield kind(**dict(zip(required, chosen, strict=True)))
        for name, values in optional.items():
            for value in values:
                yield kind(**dict(zip(required, chosen, strict=True)), **{name: value})


def _values(name: str, hint: Any) -> list[Any]:
    quantity = {"gpu": Quantity(1000), "memory": Quantity("unknown", per="replica")}
    entry = lifecycle.BudgetEntry("gpus/acme", "now", "gpu", 8000, 1000)
    candidate = lifecycle.Candidate("n1", "refused", "full")
    known: dict[str, Any] = {
        "candidates": (candidate,),
        "entries": (entry,),
        "fact": lifecycle.Rejected("c", "m"),
        "because": {"gpu": Why("capacity", "full")},
        "limits": {"gpu": 1000, "memory": "unlimited"},
        "allowed": {"engine": ("vllm", 1)},
        "constraints": {"engine": "vllm"},
        "route": {"node": "n1"},
        "covered": {"gpus/acme": "above"},
        "holds": {"hook": ("ground",)},
        "duration_us": 7,
        "window_ms": 5,
    }
    if name == "constraints" and "tuple" in str(hint):
        return [{"engine": ("vllm", 1)}]
    if name == "resources":
        return [quantity if "Quantity" in str(hint) else {"gpu": 1000, "memory": "unknown"}]
    if name in known:
        return [known[name]]
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Literal:
            return list(get_args(one))
    if hint is bool:
        return [True, False]
    return [("x", "y")] if "tuple" in str(hint) else ["some text"]


EVERY = [(state, name) for state in sorted(TRANSITIONS) for name in sorted(TRANSITIONS[state] | NOTES[state])]


@pytest.mark.parametrize(("state", "name"), EVERY)
def test_every_event_has_a_sentence_in_every_state(state: str, name: str) -> None:
    facts = list(samples(TYPES[name]))
    if name == "late":
        facts = [Late(fact) for other in TYPES if other != "late" for fact in samples(TYPES[other])]
    assert facts
    for fact in facts:
        record = Record(seal(ask(), id="x", now=START).envelope)
        record.state = state
        record.apply(Event("x", 0, "2026-11-27T11:02:00.000000Z", "test", fact))
        holds(record, explain(record, now=LOOKED))


def granted(given: Granted, **asked: Any) -> Explanation:
    record = Record(seal(ask(**asked), id="x", now=START).envelope)
    for number, fact in enumerate((lifecycle.Admitted(), given)):
        record.apply(Event("x", number, "2026-11-27T11:02:00.000000Z", "resolver", fact))
    said = explain(record, now=LOOKED)
    holds(record, said)
    return said


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize(
    "given",
    [Granted({"gpu": Quantity(1000)}, "reserved", because={}), Granted({}, "reserved", constraints={"engine": "x"})],
    ids=["resource", "constraint"],
)
def test_every_cause_says_what_would_have_to_change(cause: Any, given: Granted) -> None:
    key = "gpu" if given.resources else "engine"
    grant = msgspec.structs.replace(given, because={key: Why(cause, "so it is")})
    said = granted(grant, requested={"gpu": 4}, constraints={"engine": "vllm"})
    path = f"{'resources' if given.resources else 'constraints'}.{key}"
    for section in ("given", "change"):
        found = [s for s in said.section(section) if path in s.keys and cause in s.codes]
        assert len(found) == 1, (section, texts(said))
    assert '"so it is"' in " ".join(s.text for s in said.section("given"))


@pytest.mark.parametrize(
    ("found", "given", "asked"),
    [
        ("equal", {"gpu": 4000}, {"gpu": 4}),
        ("reduced", {"gpu": 1000}, {"gpu": 4}),
        ("raised", {"gpu": 8000}, {"gpu": 4}),
        ("added", {"gpu": 4000, "memory": 1}, {"gpu": 4}),
        ("withheld", {"gpu": 0}, {"gpu": 4}),
        ("ignored", {}, {"gpu": 4}),
        ("unknown", {"gpu": "unknown"}, {"gpu": 4}),
        ("substituted", {"gpu": 4000}, {"gpu": 4}),
    ],
)
def test_every_outcome_is_told(found: str, given: dict[str, Any], asked: dict[str, Any]) -> None:
    instead = {"engine": "other"} if found == "substituted" else {"engine": "llama.cpp"}
    grant = Granted({key: Quantity(amount) for key, amount in given.items()}, "reserved", constraints=instead)
    said = granted(grant, requested=asked)
    assert [s for s in said.section("given") if found in s.codes]
    changes = [s.text for s in said.section("change")]
    nothing = found in ("equal", "added")
    assert (changes == ["Nothing: all that was asked for was given."]) is nothing
    assert nothing or any("record does not say" in text or "state an amount" in text for text in changes)


@pytest.mark.parametrize("code", [*CODES, "a_code_of_an_older_version"])
def test_every_code_says_what_would_have_to_change(code: str) -> None:
    for facts in (
        [lifecycle.Verdict("hook", "1", "deny", code, "no"), lifecycle.Denied(code, "no")],
        [lifecycle.Denied(code, "no")],
    ):
        record = Record(seal(ask(), id="x", now=START).envelope)
        for number, fact in enumerate(facts):
            record.apply(Event("x", number, "2026-11-27T11:02:00.000000Z", "test", fact))
        said = explain(record, now=LOOKED)
        holds(record, said)
        [change] = said.section("change")
        assert change.codes == (code,) and change.events


def test_what_the_record_does_not_say_is_not_made_up() -> None:
    said = granted(
        Granted({"gpu": Quantity(1000)}, "reserved", because={"gpu": Why("capacity", "full")}), requested={"gpu": 4}
    )
    assert "which places were considered the record does not say" in said.section("change")[0].text
    quota = Granted({"gpu": Quantity(1000)}, "reserved", because={"gpu": Why("quota", "used up")})
    assert "its account is not on the record" in granted(quota, requested={"gpu": 4}).section("change")[0].text
    record, _ = told("no_room")
    bare = Record(record.envelope, [event for event in record.events if event.data.type in ("sealed", "admitted")])
    bare = Record(record.envelope, [msgspec.structs.replace(e, sequence=n) for n, e in enumerate(bare.events)])
    said = explain(bare, now=LOOKED)
    assert "what it waits for the record does not say" in " ".join(s.text for s in said.section("waits"))
    assert "the record does not say" in said.section("change")[0].text


def test_what_was_said_in_shadow_refused_nothing() -> None:
    record = Record(seal(ask(), id="x", now=START).envelope)
    facts: list[EventData] = [
        lifecycle.Verdict("new-rule", "1", "deny", "policy", "not any more", shadow=True),
        lifecycle.Verdict("rule", "1", "deny", "policy", "no"),
        lifecycle.Denied("policy", "no"),
    ]
    for number, fact in enumerate(facts):
        record.apply(Event("x", number, "2026-11-27T11:02:00.000000Z", "test", fact))
    said = explain(record, now=LOOKED)
    assert [s.text for s in said.section("short")] == ["It was denied by rule (policy)."]
    assert [s.by for s in said.section("change")] == [("rule",)]
    [shadow] = [s for s in said.section("decided") if "new-rule" in s.by]
    assert "in shadow: recorded, and not enforced" in shadow.text


# What others wrote


def test_text_of_others_is_inert_and_cannot_pass_for_ours() -> None:
    record = Record(
        seal(
            ask(
                subject=Subject("user", HOSTILE, tenant=HOSTILE, roles=[HOSTILE], delegation=[(HOSTILE, HOSTILE)]),
                target=Target("model", HOSTILE),
                constraints={"engine": HOSTILE, "more": {"a": [HOSTILE]}},
                scope={"project": HOSTILE, "hints": {"h": HOSTILE}},
            ),
            id="x",
            now=START,
        ).envelope
    )
    grant = Granted(
        {"gpu": Quantity(500)},
        "reserved",
        part=HOSTILE,
        constraints={HOSTILE: HOSTILE},
        because={"gpu": Why("policy", HOSTILE)},
        route={HOSTILE: HOSTILE},
        candidates=(lifecycle.Candidate(HOSTILE, "refused", HOSTILE),),
    )
    facts: list[EventData] = [
        lifecycle.Verdict(HOSTILE, HOSTILE, "warn", HOSTILE, HOSTILE, policies=(HOSTILE,), errors=(HOSTILE,)),
        lifecycle.Admitted(),
        lifecycle.Limit({"gpu": 1}, HOSTILE, {"engine": (HOSTILE,)}, HOSTILE),
        lifecycle.Bound(HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        lifecycle.Attempt((lifecycle.Candidate(HOSTILE, "tried", HOSTILE),), HOSTILE),
        grant,
        lifecycle.Error(HOSTILE),
        lifecycle.Failed(HOSTILE, HOSTILE),
        Late(lifecycle.Violation(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)),
    ]
    for number, fact in enumerate(facts):
        record.apply(Event("x", number, HOSTILE, HOSTILE, fact))
    said = explain(record, now=LOOKED, children=[HOSTILE])
    holds(record, said)
    for text in texts(said):
        # Outside of quotes stands nothing that others wrote.
        ours = " ".join(text.split('"')[::2])
        assert text.count('"') % 2 == 0 and "granted in full" not in ours and "evil" not in ours, text
    shown = presentation.explanation_text(said, width=80)
    assert set(shown) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160), 0x202E])) == set()


def test_long_texts_and_long_histories_are_cut_and_say_so() -> None:
    record = Record(seal(ask(), id="x", now=START).envelope)
    facts: list[EventData] = [lifecycle.Admitted()]
    facts += [lifecycle.Attempt((), f"reason {number} " + "a" * 5000) for number in range(300)]
    facts += [lifecycle.Granted({"gpu": Quantity(1000)}, "reserved")]
    facts += [lifecycle.Used({"gpu": 1}, key=str(number)) for number in range(2000)]
    for number, fact in enumerate(facts):
        record.apply(Event("x", number, "2026-11-27T11:02:00.000000Z", "test", fact))
    said = explain(record, now=LOOKED)
    holds(record, said)
    course = said.section("course")
    assert len(course) == MAX_SENTENCES and course[-1].kind == "more"
    assert max(map(len, texts(said))) < 1000
    waiting = Record(record.envelope, record.events[:150])
    attempts = [s for s in explain(waiting, now=LOOKED).section("waits") if s.kind == "attempt"]
    assert "characters)" in attempts[0].text
    used = Record(
        record.envelope, [record.events[0], *(msgspec.structs.replace(e, data=e.data) for e in record.events[301:])]
    )
    [sentence] = [s for s in explain(used, now=LOOKED).section("course") if s.kind == "used"]
    assert len(sentence.events) == MAX_EVENTS and (sentence.events[0], sentence.events[-1]) == (302, 2301)


# Whatever happens


class Explained(Handles):
    """Whatever handles do to envelopes, they are explained."""

    @initialize()
    def nothing_is_explained_yet(self) -> None:
        self.explained: dict[str, Any] = {}

    @invariant()
    def every_record_is_explained(self) -> None:
        for id in getattr(self, "ids", ()):
            record, children = self.newest(id), self.ledger.children(id)
            # Of the same the same is said, which is seen below.
            if self.explained.get(id) == (record.next_sequence, children):
                continue
            self.explained[id] = record.next_sequence, children
            said = explain(record, now=LOOKED, children=children)
            holds(record, said)
            assert said == explain(Record(record.envelope, record.events), now=LOOKED, children=())
            assert presentation.explanation_text(said, width=80)


TestExplained = Explained.TestCase
TestExplained.settings = settings(max_examples=strategies.examples(30))

_text = strategies.texts
_resources = st.dictionaries(strategies.resources, strategies.amounts, max_size=3)
_quantities = st.dictionaries(
    strategies.resources,
    st.builds(Quantity, strategies.amounts, per=st.sampled_from(["total", "replica", "device"])),
    max_size=3,
)
_constraints = st.dictionaries(strategies.names, st.none() | st.booleans() | st.integers(-9, 9) | _text, max_size=2)
_candidates = st.lists(
    st.builds(
        lifecycle.Candidate, _text, st.sampled_from(["considered", "refused", "tried", "chosen"]), st.none() | _text
    ),
    max_size=2,
).map(tuple)
_why = st.dictionaries(
    strategies.resources | strategies.names, st.builds(Why, st.sampled_from(CAUSES), _text), max_size=2
)
_entry = st.builds(
    lifecycle.BudgetEntry,
    _text,
    st.sampled_from(["now", "2026-11"]),
    strategies.resources,
    strategies.numbers,
    strategies.numbers,
)
FACTS: Mapping[str, st.SearchStrategy[Any]] = {
    "sealed": st.builds(lifecycle.Sealed, _text, _text, st.none() | _text, st.lists(_text, max_size=2).map(tuple)),
    "verdict": st.builds(
        lifecycle.Verdict,
        _text,
        _text,
        st.sampled_from(OUTCOMES),
        st.none() | st.sampled_from(sorted(CODES)) | _text,
        st.none() | _text,
        shadow=st.booleans(),
        policies=st.lists(_text, max_size=2).map(tuple),
        failure=st.none() | st.sampled_from(["error", "timeout"]),
    ),
    "denied": st.builds(lifecycle.Denied, _text, _text, st.booleans()),
    "held": st.builds(
        lifecycle.Held, _text, _text, st.none() | _text, st.none() | st.just("2026-11-28T11:02:00.000000Z")
    ),
    "approval": st.builds(
        lifecycle.Approval,
        _text,
        st.sampled_from(["approve", "deny"]),
        _text,
        _text,
        st.just({"h": ()}),
        st.none() | _text,
    ),
    "limit": st.builds(lifecycle.Limit, _resources, _text, _constraints.map(lambda d: {k: (v,) for k, v in d.items()})),
    "effective": st.builds(lifecycle.Effective, st.sampled_from(CAUSES), _text, _quantities, _constraints),
    "attempt": st.builds(lifecycle.Attempt, _candidates, _text),
    "bound": st.builds(lifecycle.Bound, _text, _text, _text, _text),
    "granted": st.builds(
        lifecycle.Granted,
        _quantities,
        st.sampled_from(BASES),
        st.none() | st.sampled_from(["r0", "r1"]),
        _constraints,
        st.lists(strategies.resources | st.just("engine"), max_size=2).map(tuple),
        _why,
        candidates=_candidates,
    ),
    "used": st.builds(lifecycle.Used, _resources, st.sampled_from(["measured", "estimated"]), st.none() | _text),
    "budgeted": st.builds(lifecycle.Budgeted, st.just("reserve"), st.lists(_entry, max_size=2).map(tuple)),
    "obligation": st.builds(
        lifecycle.Obligation,
        _text,
        _text,
        st.sampled_from(["attached", "failed", "waived"]),
        st.none() | _text,
        st.booleans(),
    ),
    "violation": st.builds(lifecycle.Violation, _text, st.none() | _text, st.integers(0, 9), _text, _text),
}


@st.composite
def histories(draw: st.DrawFn) -> Record:
    """A legal history of facts that may say anything."""
    record = Record(seal(draw(strategies.asks().filter(lambda one: _sealable(one))), id="x", now=START).envelope)
    for number in range(draw(st.integers(0, 12))):
        legal = sorted(TRANSITIONS[record.state] | NOTES[record.state])
        name = draw(st.sampled_from(legal))
        fact = draw(FACTS.get(name, st.sampled_from(list(samples(TYPES[name])))))
        record.apply(Event("x", number, draw(st.just("2026-11-27T11:02:00.000000Z") | _text), draw(_text), fact))
    return record


def _sealable(one: Any) -> bool:
    try:
        seal(one, id="x", now=START)
    except Exception:
        return False
    return True


@given(histories())
def test_whatever_was_recorded_is_explained(record: Record) -> None:
    # Somebody may be called so; where nobody is, it is a mistake of ours.
    assume(b"None" not in msgspec.json.encode([record.envelope, record.events]))
    holds(record, explain(record, now=LOOKED))
    again = msgspec.json.decode(msgspec.json.encode(record.events), type=list[Event])
    assert texts(explain(Record(record.envelope, again), now=LOOKED)) == texts(explain(record, now=LOOKED))


# The command


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("explain") / "ledger.db"

    async def tell() -> str:
        store = SqliteLedger(path)
        id = await STORIES["reduced"](store, FakeClock(BEGUN))
        store.close()
        return id

    return f"sqlite:///{path}", asyncio.run(tell())


@pytest.mark.parametrize("name", ["ID", "deployment:dep-1", "END"])
def test_the_command_says_what_the_record_says(ledger: tuple[str, str], name: str) -> None:
    url, id = ledger
    name = {"ID": id, "END": id[-12:]}.get(name, name)
    shown = CliRunner().invoke(cli, ["--ledger", url, "explain", name], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    golden = (GOLDEN / "reduced.txt").read_text()
    assert shown.output == golden


def test_the_command_prints_json(ledger: tuple[str, str]) -> None:
    url, id = ledger
    shown = CliRunner().invoke(cli, ["explain", "--ledger", url, "--json", id])
    data = json.loads(shown.stdout)
    assert (data["envelope"], data["state"]) == (id, "granted")
    given = next(section for section in data["sections"] if section["name"] == "given")
    [gpu] = [s for s in given["sentences"] if s["kind"] == "difference" and s["keys"] == ["resources.gpu"]]
    assert gpu["codes"] == ["reduced", "policy", "capacity"] and gpu["by"] == ["resolver/1.2", "gpu-quota"]
    assert gpu["envelope"] is None and len(gpu["events"]) == 2
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for key in [*data, *given, *gpu]:
        assert f"`{key}`" in page, key
    for word in (*SECTIONS, *SENTENCE_KINDS):
        assert f"*{word}*" in page, word


def test_the_command_says_why_it_cannot_answer(ledger: tuple[str, str]) -> None:
    url, _ = ledger
    shown = CliRunner().invoke(cli, ["explain", "--ledger", url, "deployment:nothing"])
    assert shown.exit_code == 2 and "none is bound to `deployment:nothing`" in shown.output

"""The typed delta: every outcome, every cause, per part, and three public defects made plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Grant, Target
from execution_envelope.cli import cli
from execution_envelope.delta import Difference, Outcome, delta, in_words
from execution_envelope.envelope import seal
from execution_envelope.ledger import MemoryLedger, SqliteLedger, verify
from execution_envelope.lifecycle import CAUSES, Effective, Event, Why
from execution_envelope.resources import VOCABULARY, human, parse_quantity
from execution_envelope.testing import START, ask
from tests.strategies import base_values, resources

DEFECTS = sorted((Path(__file__).parent / "corpus" / "defects").glob("*.json"))


def differences(case: dict[str, Any]) -> list[Difference]:
    """`case`: requested, constraints, client_defaults, effective [(cause, by, resources, constraints)], grants."""
    envelope = seal(
        ask(
            requested=case.get("requested", {}),
            constraints=case.get("constraints", {}),
            client_defaults=case.get("client_defaults", {}),
        ),
        id="x",
        now=START,
    ).envelope
    steps = [
        Event(
            "x",
            number,
            "",
            step.get("by", "backend"),
            Effective(
                step["cause"],
                step.get("text", ""),
                {name: parse_quantity(name, value, field=name) for name, value in step.get("resources", {}).items()},
                step.get("constraints", {}),
            ),
        )
        for number, step in enumerate(case.get("effective", []))
    ]
    given = [
        (item.pop("by", "node"), Grant(**{"resources": {}, **item}).fact())
        for item in [dict(item) for item in case.get("grants", [])]
    ]
    return list(delta(envelope.requested, steps, given))


# One block for each case: a title, what was asked, what was made of it, what was given; then the sentences expected.
TABLE = """
# given as asked
requested {"gpu": 2, "memory": "1GiB"}
grant     {"resources": {"gpu": 2, "memory": "1GiB"}}
gpu       equal      2 as asked
memory    equal      1 GiB as asked

# less, and nobody says why
requested {"gpu": 4}
grant     {"resources": {"gpu": 1}}
gpu       reduced    asked 4, given 1; unstated (node)

# less, with a reason
requested {"gpu": 4}
grant     {"resources": {"gpu": 1}, "because": {"gpu": ["capacity", "one is free"]}}
gpu       reduced    asked 4, given 1; capacity (node): one is free

# more
requested {"memory": "1GiB"}
grant     {"resources": {"memory": "2GiB"}, "because": {"memory": ["default", "flavours are 2 GiB"]}}
memory    raised     asked 1 GiB, given 2 GiB; default (node): flavours are 2 GiB

# not asked
grant     {"resources": {"cpu": 1}}
cpu       added      not asked, given 1; unstated (node)

# not asked, added by a default that is said
effective {"cause": "default", "by": "backend", "text": "every deployment has one", "resources": {"cpu": 1}}
grant     {"resources": {"cpu": 1}}
cpu       added      not asked, given 1; default (backend): every deployment has one

# given as zero
requested {"gpu": 1}
grant     {"resources": {"gpu": 0}}
gpu       withheld   asked 1, given none; unstated (node)

# given only a reason
requested {"gpu": 1}
grant     {"resources": {"memory": 0}, "because": {"gpu": ["unsupported", "this engine runs on CPUs"]}}
gpu       withheld   asked 1, given none; unsupported (node): this engine runs on CPUs
memory    added      not asked, given 0 B; unstated (node)

# zero asked and zero given
requested {"gpu": 0}
grant     {"resources": {"gpu": 0}}
gpu       equal      0 as asked

# nobody spoke of it
requested {"context": 8192, "gpu": 1}
grant     {"resources": {"gpu": 1}}
context   ignored    asked 8192, nobody spoke of it; unstated (node)
gpu       equal      1 as asked

# honoured by name
requested {"context": 8192}
constraints {"engine": "vllm"}
grant     {"honoured": ["context", "engine"]}
context   equal      8192 as asked
engine    equal      vllm as asked

# what a client always sends is never ignored
requested {"replicas": 1, "gpu": 1}
constraints {"stream": false}
client_defaults {"replicas": 1, "stream": false}
grant     {"resources": {"gpu": 1}}
gpu       equal      1 as asked

# what a client always sends is still compared when somebody speaks of it
requested {"replicas": 1}
constraints {"stream": false}
client_defaults {"replicas": 1, "stream": false}
grant     {"resources": {"replicas": 2}, "constraints": {"stream": true}}
replicas  raised     asked 1, given 2; unstated (node)
stream    substituted asked false, given true; unstated (node)

# another value of a constraint
constraints {"engine": "vllm"}
grant     {"constraints": {"engine": "llama.cpp"}, "because": {"engine": ["fallback", "no CUDA here"]}}
engine    substituted asked vllm, given llama.cpp; fallback (node): no CUDA here

# a constraint that was only given a reason
constraints {"region": "eu"}
grant     {"because": {"region": ["unsupported", "one site only"]}}
region    withheld   asked eu, given none; unsupported (node): one site only

# a constraint that nobody asked for
grant     {"constraints": {"quantization": "q4"}}
quantization added   not asked, given q4; unstated (node)

# values of a constraint are compared as JSON
constraints {"a": [1, {"x": true}], "b": 1, "c": true}
grant     {"constraints": {"a": [1, {"x": true}], "b": "1", "c": 1}}
a         equal      [1,{"x":true}] as asked
b         substituted asked 1, given 1; unstated (node)
c         substituted asked true, given 1; unstated (node)

# one part of two got another engine, and it is told whichever part spoke last
constraints {"engine": "vllm"}
grant     {"part": "0", "constraints": {"engine": "llama.cpp"}}
grant     {"part": "1", "constraints": {"engine": "vllm"}}
engine    substituted asked vllm, given llama.cpp; unstated (node)

# an alias, said before
constraints {"engine": "auto"}
effective {"cause": "alias", "text": "auto is llama.cpp here", "constraints": {"engine": "llama.cpp"}}
grant     {"constraints": {"engine": "llama.cpp"}}
engine    substituted asked auto, given llama.cpp; alias (backend): auto is llama.cpp here

# asked 4, policy says 2, capacity gives 1: both are named
requested {"gpu": 4}
effective {"cause": "policy", "by": "guard", "text": "two for each team", "resources": {"gpu": 2}}
grant     {"resources": {"gpu": 1}, "because": {"gpu": ["capacity", "one is free"]}}
gpu       reduced    asked 4, given 1; policy (guard): two for each team; capacity (node): one is free

# asked 4, policy says 2, 1 is given: the last step is unstated
requested {"gpu": 4}
effective {"cause": "policy", "by": "guard", "text": "two for each team", "resources": {"gpu": 2}}
grant     {"resources": {"gpu": 1}}
gpu       reduced    asked 4, given 1; policy (guard): two for each team; unstated (node)

# two steps before, and the grant agrees with the last
requested {"gpu": 8}
effective {"cause": "default", "by": "api", "text": "at most four", "resources": {"gpu": 4}}
effective {"cause": "quota", "by": "guard", "text": "two are left", "resources": {"gpu": 2}}
grant     {"resources": {"gpu": 2}}
gpu       reduced    asked 8, given 2; default (api): at most four; quota (guard): two are left

# parts add up
requested {"gpu": 4, "memory": "4GiB"}
grant     {"part": "0", "resources": {"gpu": 2, "memory": "1GiB"}}
grant     {"part": "1", "resources": {"gpu": 2, "memory": "1GiB"}}
gpu       equal      4 as asked
memory    reduced    asked 4 GiB, given 2 GiB; unstated (node)

# the smallest context counts
requested {"context": 8192}
grant     {"part": "0", "resources": {"context": 8192}}
grant     {"part": "1", "resources": {"context": 4096}}
context   reduced    asked 8192, given 4096; unstated (node)

# two parts give two reasons, by two components
requested {"gpu": 4}
grant     {"by": "a", "part": "0", "resources": {"gpu": 1}, "because": {"gpu": ["capacity", "full"]}}
grant     {"by": "b", "part": "1", "resources": {"gpu": 1}, "because": {"gpu": ["quota", "used up"]}}
gpu       reduced    asked 4, given 2; capacity (a): full; quota (b): used up

# per replica: the worst part speaks
requested {"memory": {"amount": "2GiB", "per": "replica"}}
grant     {"part": "0", "resources": {"memory": "2GiB"}}
grant     {"part": "1", "resources": {"memory": "1GiB"}}
memory    reduced    asked 2 GiB per replica, given 1 GiB; unstated (node)

# per replica: when none falls short, the most speaks
requested {"memory": {"amount": "2GiB", "per": "replica"}}
grant     {"part": "0", "resources": {"memory": "2GiB"}}
grant     {"part": "1", "resources": {"memory": "3GiB"}}
memory    raised     asked 2 GiB per replica, given 3 GiB; unstated (node)

# per replica, given as one total for three
requested {"memory": {"amount": "2GiB", "per": "replica"}, "replicas": 3}
grant     {"resources": {"memory": "6GiB", "replicas": 3}}
memory    equal      2 GiB per replica as asked
replicas  equal      3 as asked

# asked as a total, given per replica
requested {"memory": "6GiB"}
grant     {"resources": {"memory": {"amount": "2GiB", "per": "replica"}, "replicas": 2}}
memory    reduced    asked 6 GiB, given 4 GiB; unstated (node)
replicas  added      not asked, given 2; unstated (node)

# per device
requested {"gpu": 2, "gpu_memory": {"amount": "80GiB", "per": "device"}}
grant     {"resources": {"gpu": 2, "gpu_memory": {"amount": "40GiB", "per": "device"}}}
gpu       equal      2 as asked
gpu_memory reduced   asked 80 GiB per device, given 40 GiB; unstated (node)

# per device, given as a total
requested {"gpu_memory": {"amount": "80GiB", "per": "device"}}
grant     {"resources": {"gpu": 2, "gpu_memory": "160GiB"}}
gpu_memory equal     80 GiB per device as asked
gpu       added      not asked, given 2; unstated (node)

# below the floor
requested {"memory": {"amount": "4GiB", "floor": "2GiB"}}
grant     {"resources": {"memory": "1GiB"}}
memory    reduced    asked 4 GiB, given 1 GiB, below the floor that was asked; unstated (node)

# within the floor
requested {"memory": {"amount": "4GiB", "floor": "2GiB"}}
grant     {"resources": {"memory": "2GiB"}}
memory    reduced    asked 4 GiB, given 2 GiB; unstated (node)

# above the ceiling
requested {"duration": {"amount": "30s", "ceiling": "60s"}}
grant     {"resources": {"duration": "2h"}}
duration  raised     asked 30 s, given 2 h, above the ceiling that was asked; unstated (node)

# unlimited is more than any number
requested {"output_tokens": "unlimited", "duration": "30s"}
grant     {"resources": {"output_tokens": 256, "duration": "unlimited"}}
output_tokens reduced asked unlimited, given 256; unstated (node)
duration  raised     asked 30 s, given unlimited; unstated (node)

# unlimited as asked
requested {"output_tokens": "unlimited"}
grant     {"resources": {"output_tokens": "unlimited"}}
output_tokens equal  unlimited as asked

# unknown cannot be compared, not even with unknown
requested {"output_tokens": "unknown", "memory": "1GiB", "gpu": "unknown"}
grant     {"resources": {"output_tokens": 10, "memory": "unknown", "gpu": "unknown"}}
output_tokens unknown asked unknown, given 10: cannot be compared; unstated (node)
memory    unknown    asked 1 GiB, given unknown: cannot be compared; unstated (node)
gpu       unknown    asked unknown, given unknown: cannot be compared; unstated (node)

# one unknown part makes the total unknown
requested {"memory": "2GiB"}
grant     {"part": "0", "resources": {"memory": "1GiB"}}
grant     {"part": "1", "resources": {"memory": "unknown"}}
memory    unknown    asked 2 GiB, given unknown: cannot be compared; unstated (node)

# nothing is compared before anything was granted
requested {"gpu": 1}
constraints {"engine": "vllm"}
"""


def cases(table: str) -> list[Any]:
    found = []
    for block in table.strip().split("\n\n"):
        title, *lines = block.splitlines()
        case: dict[str, Any] = {"effective": [], "grants": []}
        expected: list[tuple[str, str, str]] = []
        for line in lines:
            word, rest = line.split(None, 1)
            if word in ("requested", "constraints", "client_defaults"):
                case[word] = json.loads(rest)
            elif word in ("effective", "grant"):
                case["effective" if word == "effective" else "grants"].append(json.loads(rest))
            else:
                outcome, sentence = rest.split(None, 1)
                expected.append((word, outcome, sentence))
        found.append(pytest.param(case, expected, id=title.removeprefix("# ")))
    return found


@pytest.mark.parametrize(("case", "expected"), cases(TABLE))
def test_the_table(case: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    assert [(d.key, d.outcome, in_words(d)) for d in differences(case)] == expected


def test_the_table_shows_every_outcome() -> None:
    shown = {outcome for case in cases(TABLE) for _, outcome, _ in case.values[1]}
    assert shown == set(get_args(Outcome))


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_told(cause: str) -> None:
    [said] = differences(
        {"requested": {"gpu": 2}, "grants": [{"resources": {"gpu": 1}, "because": {"gpu": (cause, "so")}}]}
    )
    assert in_words(said) == f"asked 2, given 1; {cause} (node): so"
    assert said.unstated is (cause == "unstated")
    assert Why(cause, "so") == Grant(resources={}, because={"gpu": (cause, "so")}).fact().because["gpu"]  # type: ignore[arg-type]


def test_effective_values_stand_between() -> None:
    [said] = differences(
        {
            "requested": {"gpu": 4},
            "effective": [{"cause": "policy", "resources": {"gpu": 2}}],
            "grants": [{"resources": {"gpu": 1}}],
        }
    )
    assert (said.requested, said.effective, said.granted) == (4000, 2000, 1000)


@given(st.data(), resources)
def test_what_is_given_as_asked_is_equal_or_unknown(data: st.DataObject, name: str) -> None:
    value = data.draw(base_values(name))
    [said] = differences({"requested": {name: value}, "grants": [{"resources": {name: value}}]})
    assert said.outcome == ("unknown" if value == "unknown" else "equal")
    assert said.unstated == (value == "unknown")


@given(st.data(), resources)
def test_every_requested_key_is_told_once(data: st.DataObject, name: str) -> None:
    asked, given_value = data.draw(base_values(name)), data.draw(base_values(name))
    for grants in ([{"resources": {}}], [{"resources": {name: given_value}}], [{"honoured": [name]}]):
        found = differences({"requested": {name: asked}, "grants": grants})
        assert [said.key for said in found] == [name]
        assert name in VOCABULARY and in_words(found[0])


def assert_shown(ledger: Path, reference: str, expected: dict[str, Any]) -> None:
    """`envelope show` makes the defect plain in one look: the sentence, its outcome, and how many are unstated."""
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(cli, ["--ledger", f"sqlite:///{ledger}", "show", f"deployment:{reference}"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for outcome, sentence in expected["delta"].values():
        assert f"{outcome}: {sentence}" in text
    if expected["unstated"]:
        assert f"{len(expected['unstated'])} unstated" in text
    for name, amount in expected["used"].items():
        if amount < expected["granted"].get(name, 0):
            assert f"used {human(name, amount)} of {human(name, expected['granted'][name])}" in text


@pytest.mark.parametrize(
    "corpus", [json.loads(path.read_text()) for path in DEFECTS], ids=[path.stem for path in DEFECTS]
)
@pytest.mark.parametrize("where", ["memory", "sqlite"])
@pytest.mark.anyio
async def test_public_defects(corpus: Any, where: str, tmp_path: Path) -> None:
    ledger = MemoryLedger() if where == "memory" else SqliteLedger(tmp_path / "ledger.db")
    controller = AdmissionController(ledger)
    for case in corpus["envelopes"]:
        asked = dict(case["ask"])
        target = Target(**asked.pop("target"))
        admission = await controller.begin(ask(**{"constraints": {}, **asked, "target": target}))
        await admission.bind("deployment", target.id)
        for step in case["effective"]:
            await admission.effective(**step)
        for grant in case["grants"]:
            await admission.grant(Grant(**grant))
        if case.get("ready"):
            await admission.ready()
        if case.get("used"):
            await admission.used(case["used"])
        record = await controller.read("deployment", target.id)
        expected = case["expected"]
        assert record.state == expected["state"]
        assert record.ready is case.get("ready", False)
        assert record.granted == expected["granted"]
        assert {name: usage.amount for name, usage in record.used.items()} == expected["used"]
        assert {d.key: [d.outcome, in_words(d)] for d in record.differences} == expected["delta"]
        assert [d.key for d in record.differences if d.unstated] == expected["unstated"]
        if "parts" in expected:
            parts = {part: {n: q.amount for n, q in g.resources.items()} for part, g in record.grants.items()}
            assert parts == expected["parts"]
        if where == "sqlite":
            assert_shown(tmp_path / "ledger.db", target.id, expected)
    assert verify(ledger).findings == ()
    ledger.close()


def test_the_three_defects_are_here() -> None:
    assert [path.stem for path in DEFECTS] == ["kserve-6044", "llm-d-481", "ray-58328"]
    assert all(json.loads(path.read_text())["source"].startswith("https://github.com/") for path in DEFECTS)


def test_a_floor_that_is_withheld_by_a_reason_alone_is_a_breach() -> None:
    asked = {"requested": {"gpu": {"amount": 2, "floor": 1}}}
    [found] = differences({**asked, "grants": [{"because": {"gpu": ("capacity", "none left")}}]})
    assert (found.outcome, found.granted, found.breach) == ("withheld", None, "floor")
    assert "below the floor" in in_words(found)
    [zero] = differences({**asked, "grants": [{"resources": {"gpu": 0}}]})
    assert (zero.outcome, zero.breach) == ("withheld", "floor")
    [ignored] = differences({**asked, "grants": [{}]})
    assert (ignored.outcome, ignored.breach) == ("ignored", None)
    [none] = differences({"requested": {"gpu": 2}, "grants": [{"because": {"gpu": ("capacity", "none left")}}]})
    assert none.breach is None

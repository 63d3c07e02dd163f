"""What went past the seam: recorded after the fact, once, accounted, and never shown as admitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from execution_envelope import (
    AdmissionController,
    Ask,
    Decision,
    Envelope,
    Grant,
    InvalidField,
    KeyConflict,
    LedgerUnavailable,
    Record,
    Rule,
    Subject,
    Target,
    Unidentified,
    lifecycle,
)
from execution_envelope.budgets import Budget, Budgets, Prices
from execution_envelope.cli import cli
from execution_envelope.decision import Observation
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, open_ledger, verify
from execution_envelope.ledger.rollups import Question
from execution_envelope.telemetry.cloudevents import CloudEvents
from execution_envelope.telemetry.otel import OpenTelemetryObserver
from execution_envelope.telemetry.prometheus import PrometheusObserver
from execution_envelope.testing import START, FakeClock, FaultyLedger, ask
from tests import strategies

assert strategies  # it loads the settings
pytestmark = pytest.mark.anyio
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TOKENS = Budget(name="tokens", resource="output_tokens", limit=100, window="day", unknown="admit")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        made: Ledger = MemoryLedger()
    elif request.param == "sqlite":
        made = SqliteLedger(tmp_path / "l.db")
    else:
        made = open_ledger(request.getfixturevalue("postgres").schema())
    yield made
    assert verify(made, jobs=1).findings == ()
    made.close()


def chat(**overrides: Any) -> Ask:
    described = {
        "kind": "inference",
        "operation": "chat.completions",
        "target": Target("model", "smollm2-135m"),
        "requested": {"output_tokens": 500},
        "constraints": {},
        "entrypoint": None,
    }
    return ask(**described | overrides)


def controller_on(ledger: Ledger, **options: Any) -> AdmissionController:
    return AdmissionController(ledger, clock=FakeClock(), **options)


async def seen(controller: AdmissionController, key: str = "7", asked: Ask | None = None, **said: Any) -> Record:
    known: dict[str, Any] = {"source": "gateway", "key": key, "ended_at": START - HOUR, "by": "collector", **said}
    return await controller.record(asked or chat(), **known)


def types(record: Record) -> list[str]:
    return [event.data.type for event in record.events]


async def test_it_is_recorded_as_what_it_is(ledger: Ledger) -> None:
    asked = list[Envelope]()
    hook = Rule("no", lambda envelope: asked.append(envelope) or Decision.deny("policy", "never"))
    controller = controller_on(ledger, hooks=[hook])
    record = await seen(
        controller,
        began_at=START - 2 * HOUR,
        grant=Grant({"output_tokens": 300}, because={"output_tokens": ("policy", "the gateway's cap")}),
        used={"output_tokens": 60, "input_tokens": 9},
        how="estimated",
        message="200 OK",
    )
    assert types(record) == ["sealed", "observed", "granted", "used", "completed"]
    assert record.observed == lifecycle.Observed(
        "gateway", "7", "2026-05-01T11:00:00.000000Z", "2026-05-01T10:00:00.000000Z"
    )
    assert asked == [] and record.verdicts == () and not record.undecided
    assert (record.state, record.granted["output_tokens"], record.used["output_tokens"].how) == (
        "completed",
        300,
        "estimated",
    )
    assert {event.by for event in record.events} == {"collector"}
    assert controller.counters["admitted"] == controller.counters["undecided"] == 0
    assert controller.counters["recorded"] == 1
    again = await controller.read(record.id)
    assert again.events == record.events and again.envelope == record.envelope
    assert ledger.unfinished() == []


async def test_a_log_that_is_read_twice_or_by_two_collectors_is_recorded_once(ledger: Ledger) -> None:
    budgets = Budgets([TOKENS])
    collectors = [controller_on(ledger, budgets=budgets), controller_on(ledger, budgets=budgets)]
    ids = set[str]()

    async def read_log(controller: AdmissionController) -> None:
        for number in range(4):
            ids.add((await seen(controller, str(number), used={"output_tokens": 5})).id)

    async with anyio.create_task_group() as group:
        for controller in [*collectors, *collectors]:
            group.start_soon(read_log, controller)
    assert len(ids) == 4
    assert [balance.spent for balance in ledger.balances()] == [20]
    counters = [controller.counters for controller in collectors]
    assert sum(counted["recorded"] for counted in counters) == 4
    assert sum(counted["recorded_again"] for counted in counters) == 12
    # The same entry of another log is another execution.
    assert (await seen(collectors[0], "0", source="other gateway")).id not in ids


async def test_another_request_under_the_same_entry_is_refused(ledger: Ledger) -> None:
    controller = controller_on(ledger)
    first = await seen(controller)
    with pytest.raises(KeyConflict, match="was recorded with first") as conflict:
        await seen(controller, asked=chat(requested={"output_tokens": 1}))
    assert conflict.value.envelope_id == first.id and not conflict.value.retryable


async def test_an_entry_belongs_to_one_tenant_and_one_subject(ledger: Ledger) -> None:
    controller = controller_on(ledger, budgets=Budgets([replace(TOKENS, per=("tenant",))]))
    acme, umbra = (Subject("user", "dana", tenant=tenant) for tenant in ("acme", "umbra"))
    first, other = [await seen(controller, asked=chat(subject=one), used={"output_tokens": 5}) for one in (acme, umbra)]
    assert (first.envelope.identity.tenant, other.envelope.identity.tenant) == ("acme", "umbra")
    assert sorted(balance.spent for balance in ledger.balances()) == [5, 5]
    with pytest.raises(KeyConflict, match="expected the subject that") as conflict:
        await seen(controller, asked=chat(subject=replace(acme, id="eve")), used={"output_tokens": 5})
    assert conflict.value.envelope_id == first.id


async def test_a_callers_own_key_is_no_key_of_the_log(ledger: Ledger) -> None:
    controller = controller_on(ledger)
    record = await seen(controller, asked=chat(idempotency_key="k1"))
    admission = await controller.begin(chat(idempotency_key="k1"))
    assert admission.id != record.id and not admission.replayed
    assert record.envelope.correlation.idempotency_key == "k1"


@pytest.mark.parametrize(
    ("said", "types_", "code"),
    [
        ({"outcome": "failed", "code": "502"}, ["sealed", "observed", "failed"], "502"),
        ({"outcome": "rejected"}, ["sealed", "observed", "rejected"], "rejected"),
        ({"outcome": "cancelled"}, ["sealed", "observed", "cancelled"], None),
        ({"outcome": "failed", "grant": Grant({})}, ["sealed", "observed", "granted", "failed"], "failed"),
    ],
)
async def test_how_it_ended(said: dict[str, Any], types_: list[str], code: str | None) -> None:
    record = await seen(controller_on(MemoryLedger()), **said)
    assert types(record) == types_ and getattr(record.events[-1].data, "code", None) == code


# Accounted


async def test_what_was_used_is_taken_whatever_is_left(ledger: Ledger) -> None:
    controller = controller_on(ledger, budgets=Budgets([TOKENS]))
    yesterday = START - DAY
    for number, spent in enumerate([60, 120, 180]):
        record = await seen(controller, str(number), ended_at=yesterday, used={"output_tokens": 60})
        [balance] = ledger.balances()
        assert (balance.window, balance.reserved, balance.spent) == ("2026-04-30", 0, spent)
        over = [] if spent == 60 else [f"output_tokens {spent} is beyond the 100 that budget tokens/acme allows"]
        assert [violation.text.split(" (")[0] for violation in record.violations] == over
    assert controller.counters["violations"] == 2
    # A report that comes late is taken as of any other execution.
    late = await controller.resume(record.id, by="collector")
    await late.used({"output_tokens": 5}, key="late")
    await late.used({"steps": 1}, key="other")
    [balance] = ledger.balances()
    assert balance.spent == 185
    # What is asked for today is not touched by yesterday's.
    assert (await controller.begin(chat(requested={"output_tokens": 100}))).state == "admitted"


async def test_an_execution_over_midnight_belongs_to_the_day_on_which_it_began() -> None:
    ledger = MemoryLedger()
    controller = controller_on(ledger, budgets=Budgets([TOKENS]))
    midnight = START.replace(hour=0)
    await seen(controller, began_at=midnight - HOUR, ended_at=midnight + HOUR, used={"output_tokens": 1})
    assert [balance.window for balance in ledger.balances()] == ["2026-04-30"]


@pytest.mark.parametrize(
    ("said", "spent", "unknown"),
    [
        ({"used": {"output_tokens": 7}}, 7, 0),
        ({}, 500, 0),  # nobody said: it may have been all that was asked for
        ({"grant": Grant({"output_tokens": 30})}, 30, 0),
        ({"grant": Grant({"output_tokens": 30}), "used": {"output_tokens": 50}}, 50, 0),
        ({"outcome": "rejected"}, 0, 0),
        ({"used": {"output_tokens": "unknown"}}, 500, 1),
    ],
)
async def test_unknown_is_never_zero(said: dict[str, Any], spent: int, unknown: int) -> None:
    ledger = MemoryLedger()
    held = Budget(name="gpus", resource="gpu", limit=1)
    controller = controller_on(ledger, budgets=Budgets([replace(TOKENS, limit=1000), held]))
    record = await seen(controller, **said)
    balances = {balance.account: balance for balance in ledger.balances()}
    assert balances.keys() == {"tokens/acme"}  # what has ended holds nothing
    assert (balances["tokens/acme"].spent, balances["tokens/acme"].unknown) == (spent, unknown)
    # A late word on something else changes none of it.
    await (await controller.resume(record.id, by="c")).used({"steps": 3})
    assert ledger.balances() == list(balances.values())
    assert verify(ledger).findings == ()


async def test_a_budget_that_is_only_counted_is_over_run_in_shadow() -> None:
    ledger = MemoryLedger()
    controller = controller_on(ledger, budgets=Budgets([replace(TOKENS, mode="shadow")]))
    record = await seen(controller, used={"output_tokens": 101})
    assert [violation.source for violation in record.violations] == ["shadow budget tokens/acme"]


async def test_it_costs_what_the_price_table_says() -> None:
    prices = Prices("v1", "EUR", {"smollm2-*": {"output_tokens": "2"}})
    controller = controller_on(MemoryLedger(), budgets=Budgets(prices=prices))
    record = await seen(controller, used={"output_tokens": 30})
    assert record.used["cost"].amount == 60


async def test_more_than_a_parent_has_is_a_violation_on_the_record(ledger: Ledger) -> None:
    controller = controller_on(ledger)
    run = await controller.begin(chat(kind="agent.run", requested={"output_tokens": 100}))
    await run.grant(Grant({"output_tokens": 100}))
    within = await seen(controller, "1", chat(part_of=run.id), grant=Grant({"output_tokens": 70}))
    beyond = await seen(controller, "2", chat(part_of=run.id), grant=Grant({"output_tokens": 70}))
    assert within.violations == () and within.envelope.correlation.part_of == run.id
    assert [violation.granted for violation in beyond.violations] == [140]
    await run.complete()
    late = await seen(controller, "3", chat(part_of=run.id), used={"output_tokens": 1})  # its log was read too late
    assert ledger.children(run.id) == [within.id, beyond.id, late.id]
    assert (await controller.tree(run.id)).used["output_tokens"].amount == 1


@given(uses=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 80), st.booleans()), max_size=12))
def test_a_balance_is_what_the_entries_of_the_log_add_up_to(uses: list[tuple[int, int, bool]]) -> None:
    """However often and by whichever of two collectors each was recorded; and what went beyond was said."""

    async def replay() -> None:
        ledger = MemoryLedger()
        collectors = [controller_on(ledger, budgets=Budgets([TOKENS])) for _ in range(2)]
        first: dict[str, int] = {}
        for key, amount, other in uses:
            before = sum(first.values())
            record = await seen(collectors[other], str(key), used={"output_tokens": amount})
            if str(key) not in first:
                first[str(key)] = amount
                assert bool(record.violations) is (amount > 0 and before + amount > 100)
        assert sum(balance.spent for balance in ledger.balances()) == sum(first.values())
        assert len(ledger.newest(99)) == len(first)
        assert verify(ledger).findings == ()

    anyio.run(replay)


# Refused, or lost


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"source": ""}, "expected a name, got `` - at `record.source`"),
        ({"key": None}, "at `record.key`"),
        ({"key": "x" * 300}, "up to 256 characters, got 300 - at `record.key`"),
        ({"ended_at": None}, "expected when it ended, got none - at `record.ended_at`"),
        ({"ended_at": datetime(2026, 1, 1)}, "expected a time with a zone, got .* - at `record.ended_at`"),
        ({"ended_at": START + HOUR}, "expected a time that has passed, got .* - at `record.ended_at`"),
        ({"began_at": START}, "expected a time before its end .* - at `record.began_at`"),
        ({"outcome": "admitted"}, "expected one of completed, failed, .*, got `admitted` - at `record.outcome`"),
        ({"outcome": "rejected", "grant": Grant({})}, "expected `failed`, .* - at `record.outcome`"),
        ({"how": "guessed"}, "expected `measured` or `estimated`, got `guessed` - at `record.how`"),
        ({"used": {"gpus": 1}}, "at `record.used.gpus`"),
        ({"used": [1]}, "expected resources with their amounts, got `list` - at `record.used`"),
        ({"grant": {"output_tokens": 1}}, "expected a `Grant`, got `dict` - at `record.grant`"),
        ({"outcome": "failed", "code": None}, "expected text, got `NoneType` - at `record.code`"),
        ({"message": 5}, "expected text, got `int` - at `record.message`"),
        ({"by": None}, "expected a name, got `None` - at `record.by`"),
        ({"asked": chat(supersedes="x")}, "expected none, .* - at `correlation.supersedes`"),
    ],
)
async def test_what_cannot_be_recorded_is_named(said: dict[str, Any], problem: str) -> None:
    ledger = MemoryLedger()
    with pytest.raises(InvalidField, match=problem):
        await seen(controller_on(ledger), **said)
    assert ledger.newest(9) == []


@pytest.mark.parametrize("name", ["usage", "begin_at"])
async def test_a_keyword_that_it_does_not_know_is_named(name: str) -> None:
    ledger = MemoryLedger()
    with pytest.raises(TypeError, match=f"expected keywords of source, key, .*, got `{name}`"):
        await seen(controller_on(ledger), **{name: None})
    assert ledger.newest(9) == []


async def test_who_records_has_to_be_named() -> None:
    said: dict[str, Any] = {"source": "gateway", "key": "7", "ended_at": START - HOUR}
    with pytest.raises(InvalidField, match=r"at `record\.by`"):
        await controller_on(MemoryLedger()).record(chat(), **said)


async def test_somebody_has_to_have_asked() -> None:
    with pytest.raises(Unidentified):
        await seen(controller_on(MemoryLedger()), asked=chat(subject=None))


@pytest.mark.parametrize("after", [False, True])
async def test_when_the_ledger_is_away_it_is_recorded_by_trying_again(after: bool, tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "l.db")
    controller = controller_on(FaultyLedger(ledger, 1, after=after))
    with pytest.raises(LedgerUnavailable):
        await seen(controller)
    record = await seen(controller)
    assert [record.id] == ledger.newest(9) and types(record)[-1] == "completed"
    assert verify(ledger).findings == ()
    await controller.aclose()


async def test_secrets_of_the_request_are_nowhere() -> None:
    controller = controller_on(MemoryLedger())
    asked = chat(schema="chat", body={"env": {"TOKEN": "hunter2hunter2"}}, secrets=("env.TOKEN",))
    record = await seen(
        controller,
        asked=asked,
        outcome="failed",
        message="bad token hunter2hunter2",
        grant=Grant({"output_tokens": 1}, because={"output_tokens": ("policy", "for hunter2hunter2")}),
    )
    assert "hunter2" not in repr(record.events) and "bad token" in repr(record.events)


# Shown


async def test_what_shows_it_says_that_it_was_observed(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    controller = controller_on(SqliteLedger(path))
    await controller.begin(ask())
    record = await seen(controller, began_at=START - DAY, used={"output_tokens": 60})
    projection = controller.ledger.projection()
    row = projection.get(record.id)
    assert row is not None and (row.observed, row.state, row.day) == (True, "completed", "2026-04-30")
    assert projection.coverage().of["observed"].newest == (record.id,)
    [day] = projection.totals(Question("2026-04-30", "2026-04-30")).totals
    assert day.amounts["output_tokens"]["used"].total == 60
    await controller.aclose()

    def run(*words: str) -> str:
        found = CliRunner().invoke(cli, [*words, "--ledger", f"sqlite:///{path}"], env={"COLUMNS": "200"})
        assert found.exit_code == 0, found.output
        return found.stdout

    assert json.loads(run("coverage", "--json"))["observed"] == {"count": 1, "newest": [record.id]}
    assert "let them come through the seam" in run("coverage")
    [listed] = [line for line in run("list").splitlines() if record.id[-12:] in line]
    assert "observed" in listed and "admitted" not in listed
    assert [json.loads(line)["observed"] for line in run("list", "--json").splitlines()] == [True, False]
    shown = run("show", record.id)
    assert "OBSERVED, COMPLETED" in shown and "entry 7 of gateway" in shown
    data = json.loads(run("show", record.id, "--json"))
    assert data["observed"] is True and data["undecided"] is False
    [only] = run("list", "--observed", "--json").splitlines()
    assert json.loads(only)["id"] == record.id
    assert run("list", "--observed", "--kind", "model.deploy", "--json") == ""
    assert "sound" in run("verify")


async def test_telemetry_never_takes_it_for_an_admission() -> None:
    record = await seen(controller_on(MemoryLedger()), began_at=START - 2 * HOUR, grant=Grant({"output_tokens": 9}))
    observation = Observation(record, record.events)
    registry = CollectorRegistry()
    PrometheusObserver(registry).observe(observation)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"execution_envelope_{name}", {"kind": "inference", **labels})

    assert value("admissions_total", outcome="observed") == 1
    assert value("admissions_total", outcome="admitted") is value("admissions_total", outcome="undecided") is None
    assert value("duration_seconds_sum", state="completed") == HOUR.total_seconds()
    assert value("time_to_grant_seconds_count") is None  # nobody waited
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    OpenTelemetryObserver(tracer_provider=provider).observe(observation)
    [span] = exporter.get_finished_spans()
    assert span.attributes is not None and span.attributes["execution_envelope.observed"] is True
    assert span.start_time is not None and span.end_time is not None
    assert span.end_time - span.start_time == HOUR.total_seconds() * 1e9
    assert [event.name for event in span.events][:1] == ["execution_envelope.observed"]
    message = CloudEvents().message(record.events[1], record.envelope)
    assert message.type == "io.execution-envelope.observed" and json.loads(message.body)["data"]["event"]["key"] == "7"
    provider.shutdown()


async def test_the_same_without_an_event_loop() -> None:
    controller = controller_on(MemoryLedger())

    def work() -> str:
        seam = controller.blocking()
        said: dict[str, Any] = {"source": "gateway", "key": "7", "ended_at": START - HOUR, "by": "collector"}
        return seam.record(chat(), **said).id

    id = await anyio.to_thread.run_sync(work)
    assert id == (await seen(controller)).id


async def test_reconciliation_has_nothing_to_do_with_it(ledger: Ledger) -> None:
    controller = controller_on(ledger)
    await seen(controller)
    found = await controller.reconcile({}, everything=True)
    assert found.found == [] and found.waiting == 0

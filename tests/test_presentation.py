"""Records as pictures and as plain data."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import anyio
import pytest
from rich.console import Console, RenderableType

from execution_envelope import (
    Admission,
    AdmissionController,
    Ask,
    Candidate,
    Decision,
    Denied,
    Grant,
    Record,
    Rule,
    Subject,
    Target,
    Violation,
    established,
    lifecycle,
    per_replica,
    presentation,
    total,
)
from execution_envelope.ledger import Finding, MemoryLedger
from execution_envelope.ledger.chain import Closed, Entry, Opened
from execution_envelope.presentation.facts import short_delta
from execution_envelope.presentation.text import span
from execution_envelope.process import Process
from execution_envelope.sentences import SENTENCES, sentence

NOW = datetime(2026, 5, 1, 13, 0, tzinfo=UTC)
HOSTILE = "only \x1b[31mred\x1b[0m \x9b31m [bold]loud[/bold] :smile: \u202eevil\nnew line\x07"


def ask(**changes: Any) -> Ask:
    values: dict[str, Any] = {
        "kind": "model.deploy",
        "operation": "serving.deploy_model",
        "target": Target("model", "smollm2"),
        "subject": Subject("user", "dana", tenant="acme", roles=["operator"], delegation=[("org", "acme")]),
        "scope": {"project": "support-bot", "environment": established("prod", by="token")},
        "requested": {"replicas": 2, "memory": "512MiB", "context": 32768},
        "constraints": {"engine": "llamacpp"},
    }
    return Ask(**values | changes)


def record(what: Ask, then: Callable[[Admission], Awaitable[None]] | None = None, **options: Any) -> Record:
    """The record of one request through a controller in memory; every step of its clock is a second."""
    clock = [datetime(2026, 5, 1, 12, tzinfo=UTC)]

    def tick() -> datetime:
        clock[0] += timedelta(seconds=1)
        return clock[0]

    async def run() -> Record:
        controller = AdmissionController(MemoryLedger(), clock=tick, **options)
        try:
            admission = await controller.begin(what)
        except Denied as refusal:
            assert refusal.envelope_id is not None
            return await controller.read(refusal.envelope_id)
        if then is not None:
            await then(admission)
        return await controller.read(admission.id)

    return anyio.run(run)


def picture(renderable: RenderableType, width: int = 100) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.export_text(styles=False)


def sheet(shown: Record, width: int = 100, **options: Any) -> str:
    text = picture(presentation.sheet(shown, now=NOW, width=width, **options), width)
    assert max(len(line) for line in text.splitlines()) <= width
    return text


def listing(records: Sequence[Record], width: int = 100) -> str:
    rows = [presentation.list_row(shown, now=NOW) for shown in records]
    return picture(presentation.list_table(rows, width=width), width)


def words(text: str) -> str:
    """The text of a picture without line breaks and columns' spaces."""
    return " ".join(text.replace("│", " ").split())


async def reduced(admission: Admission) -> None:
    await admission.bind("deployment", "dep-1", owner="engines")
    await admission.effective({"concurrency": 4}, cause="default", because="4 slots for each engine")
    await admission.grant(
        Grant(
            {"replicas": 1, "memory": "512MiB", "context": 8192},
            route={"node": "n1"},
            by="resolver/1.2",
            basis="enforced",
            because={"replicas": ("capacity", "one node is free"), "context": ("capacity", "8192 tokens fit")},
            candidates=[Candidate("n1", "chosen"), Candidate("n2", "refused", "only 100 MiB are free")],
        )
    )
    await admission.ready()
    await admission.used({"memory": "301MiB", "cpu_time": "3s"})


async def waiting(admission: Admission) -> None:
    await admission.bind("deployment", "dep-2")
    for _ in range(3):
        await admission.attempt([Candidate("n1", "refused", "only 212 MiB are free")], reason="no node has room")


async def in_parts(admission: Admission) -> None:
    await admission.bind("deployment", "dep-3")
    await admission.grant(Grant({"memory": "256MiB", "replicas": 1}, part="replica-0", basis="allocated", by="sched"))
    await admission.grant(
        Grant(
            {"memory": "200MiB", "replicas": 1},
            part="replica-1",
            by="sched",
            because={"memory": ("capacity", "200 MiB are free on n2")},
        )
    )
    await admission.ready("replica-0")
    await admission.release("replica-1", reason="the node went away")


async def failed(admission: Admission) -> None:
    await admission.grant(Grant({"memory": "512MiB"}, honoured=["replicas", "context", "engine"]))
    await admission.fail("engine_died", "signal 9 while it served")
    await admission.used({"memory": "300MiB"}, how="estimated")


def test_every_event_type_has_a_sentence() -> None:
    types = {str(fact.__struct_config__.tag) for fact in get_args(lifecycle.EventData)}
    assert set(SENTENCES) == types
    assert types >= lifecycle.OPEN | lifecycle.TERMINAL


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        (
            lifecycle.Sealed("a" * 64, "b" * 64, "c" * 64, ("request.env.TOKEN",)),
            "the five families were sealed, sha256 aaaaaaaaaaaa..., under an idempotency key; "
            "credentials were taken out at request.env.TOKEN",
        ),
        (lifecycle.Verdict("q", "1", "deny", "policy", "no"), "q 1 says deny (policy): no"),
        (
            lifecycle.Verdict("q", "1", "deny", "hook_timeout", "no answer", failure="timeout", failure_mode="deny"),
            "q 1 failed (timeout: no answer); its failure mode deny was applied (hook_timeout)",
        ),
        (lifecycle.Admitted(), "admitted, it may go on"),
        (lifecycle.Admitted(undecided=True), "admitted undecided: no decider covers this kind"),
        (lifecycle.Admitted(shadow="denied"), "admitted, not enforced: enforcing would have denied it"),
        (
            lifecycle.Observed("gateway", "7", "2026-05-01T12:00:00.000000Z", "2026-05-01T11:59:00.000000Z"),
            "observed after the fact, never admitted, no decider was asked: entry 7 of gateway, "
            "from 2026-05-01 11:59:00Z to 2026-05-01 12:00:00Z",
        ),
        (lifecycle.Reported("ready", 7, "r0"), "r0 is ready as of revision 7, says the backend"),
        (lifecycle.Reported("pending", "8", None, "full"), "it is pending as of revision 8, says the backend: full"),
        (lifecycle.Denied("capacity", "full", True), "denied (capacity): full; trying later can help"),
        (
            lifecycle.Held("approval_required", "ask a boss", "k1"),
            "held until somebody approves (approval_required): ask a boss; to be sent again under the key k1",
        ),
        (lifecycle.Expired(), "expired: nobody approved it in time"),
        (lifecycle.Limit({"memory": 2**30}, "quota"), "quota allows at most memory 1 GiB"),
        (
            lifecycle.Effective("alias", "the short name", {}, {"model": "smollm2"}),
            "taken for model smollm2; alias: the short name",
        ),
        (
            lifecycle.Attempt((Candidate("n1", "refused", "full"),), "no room"),
            "found no room: no room (n1 refused: full)",
        ),
        (
            lifecycle.Bound("job", "7", "slurm", "2026-05-01T12:00:00.000000Z"),
            "bound to job:7, owned by slurm, to be asked after from 2026-05-01 12:00:00Z",
        ),
        (lifecycle.Granted({}, "reserved"), "the whole is granted nothing countable (reserved)"),
        (lifecycle.Released("replica-0", "drained"), "replica-0 was released: drained"),
        (lifecycle.Ready(), "it serves"),
        (lifecycle.Used({"gpu": 500}, "estimated", "r0"), "r0 used gpu 0.5 (estimated)"),
        (lifecycle.Violation("gpu", 1, 2, "quota", "gpu 2 is beyond 1"), "beyond a bound: gpu 2 is beyond 1"),
        (lifecycle.Error("oh"), "an error that did not end it: oh"),
        (lifecycle.Rejected("no_gpu", "no GPU here"), "rejected (no_gpu): no GPU here"),
        (lifecycle.Completed("unknown"), "completed, what was granted is unknown"),
        (lifecycle.Failed("died", ""), "failed (died)"),
        (lifecycle.Cancelled(), "cancelled"),
        (lifecycle.Review("policy", "1", "keep", revision="r2"), "may go on by review of policy 1, policy revision r2"),
        (
            lifecycle.Review("policy", "2", "flag", "role_required", "only operators"),
            "flagged by review of policy 2 (role_required): only operators",
        ),
        (
            lifecycle.Review("user:kim", "1", "revoke", text="it leaks", admission="e"),
            "to be revoked by review of user:kim: it leaks",
        ),
        (lifecycle.Revocation("node", "refused", "it is pinned"), "its owner node refused to revoke it: it is pinned"),
        (
            lifecycle.Revocation("node", "unknown", "no answer"),
            "its owner node did not confirm that it was revoked: no answer",
        ),
        (lifecycle.Revoked("by review"), "revoked: by review"),
        (lifecycle.Abandoned("its process is gone"), "abandoned: its process is gone"),
        (lifecycle.Late(lifecycle.Ready("r0")), "after the end: r0 serves"),
    ],
)
def test_sentences(fact: lifecycle.EventData, said: str) -> None:
    assert sentence(fact) == said


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_reduced_record(width: int) -> None:
    shown = record(ask(requested={"replicas": 2, "context": 32768, "cpu": 2}, client_defaults={"cpu": 2}), reduced)
    text = words(sheet(shown, width))
    assert "GRANTED" in text
    assert "asked by acme/user:dana, acting for org:acme" in text
    assert "bound to deployment:dep-1, owned by engines" in text
    assert "project support-bot (asserted); environment prod (established by token)" in text
    assert "resources 2 reduced, 1 added, 1 ignored, 2 unstated" in text
    assert "client default" in text
    assert "basis: enforced (a limit that holds), granted by resolver/1.2" in text
    assert "went to node n1 chosen n1 refused n2: only 100 MiB are free" in text
    assert "undecided: no decider covers this kind" in text
    if width == 80:
        said = "reduced: asked 32768, given 8192; capacity (resolver/1.2): 8192 tokens fit"
        assert said in text
        assert "not asked, not in the grant: default (backend): 4 slots for each engine" in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_four_values_stand_side_by_side(width: int) -> None:
    shown = record(ask(requested={"memory": total("1GiB", floor="256MiB")}, constraints={}), reduced)
    row = next(line for line in sheet(shown, width).splitlines() if line.split()[:1] == ["memory"])
    assert row.split()[:8] == ["memory", "1", "GiB", "same", "512", "MiB", "301", "MiB"]
    assert "floor 256 MiB" in sheet(shown, width)


@pytest.mark.parametrize("width", [80, 100])
def test_a_denied_record(width: int) -> None:
    no = Rule("operators", lambda envelope: Decision.deny("role_required", "only operators deploy"))
    shown = record(ask(), hooks=[no])
    text = words(sheet(shown, width))
    assert "DENIED" in text
    assert "denied (role_required): only operators deploy" in text
    assert "resources nothing granted" in text
    assert "memory 512 MiB same denied -" in text
    assert presentation.details(shown, now=NOW)["resources"][0]["outcome"] == "denied"


@pytest.mark.parametrize("width", [80, 100])
def test_a_pending_record_with_attempts(width: int) -> None:
    text = words(sheet(record(ask(), waiting), width))
    assert "resources pending" in text
    assert "memory 512 MiB same pending -" in text
    assert "no room 3 times: no node has room first 2026-05-01 12:00:" in text
    assert "refused n1: only 212 MiB are free" in text


@pytest.mark.parametrize("width", [80, 100])
def test_each_part_of_a_grant(width: int) -> None:
    shown = record(ask(requested={"replicas": 2, "memory": per_replica("256MiB")}, constraints={}), in_parts)
    text = words(sheet(shown, width))
    assert "basis: differs, see each part" in text
    assert "held now: memory 256 MiB, replicas 1; granted: memory 456 MiB, replicas 2" in text
    assert "replica-0 held, serves allocated memory 256 MiB, replicas 1" in text
    assert "replica-1 released reserved memory 200 MiB, replicas 1" in text
    assert (
        "asked 256 MiB per replica, given 200 MiB; capacity (sched): 200 MiB are free on n2"
        in text.replace("( sched", "(sched")
        or width == 100
    )
    data = presentation.details(shown, now=NOW)
    assert [(part["part"], part["released"], part["ready"]) for part in data["parts"]] == [
        ("replica-0", False, True),
        ("replica-1", True, False),
    ]
    memory = next(line for line in data["resources"] if line["key"] == "memory")
    assert memory["granted"] == {"amount": 200 * 2**20, "per": "replica", "total": 456 * 2**20}
    assert memory["requested"]["per"] == "replica"


def test_parts_that_are_alike_take_one_line() -> None:
    async def alike(admission: Admission) -> None:
        for part in ("r0", "r1"):
            await admission.grant(Grant({"memory": "1GiB"}, part=part))

    assert "parts: r0, r1, each memory 1 GiB" in sheet(record(ask(), alike))


@pytest.mark.parametrize("width", [80, 100])
def test_a_failed_record_keeps_what_came_late(width: int) -> None:
    shown = record(ask(), failed)
    text = words(sheet(shown, width))
    assert "FAILED" in text
    assert "failed (engine_died): signal 9 while it served" in text
    assert "late it used memory 300 MiB (estimated)" in text
    assert "300 MiB" in text
    assert "estimated" in text
    data = presentation.details(shown, now=NOW)
    assert data["late"] == 1
    assert data["held"] == {}
    assert data["granted"] == {"memory": 512 * 2**20, "context": 32768, "replicas": 2}


@pytest.mark.parametrize("width", [80, 100])
def test_devices_held_and_not_used_are_plain_to_see(width: int) -> None:
    """kserve/kserve#6044: a parallelism setting ignored, 4 GPUs held, 2 used, still ready."""

    async def idle(admission: Admission) -> None:
        await admission.grant(Grant({"gpu": 4}, by="kserve", basis="allocated"))
        await admission.ready()
        await admission.used({"gpu": 2})

    shown = record(ask(requested={"gpu": 4}, constraints={"tensor_parallel_size": 2}), idle)
    text = words(sheet(shown, width))
    assert "1 ignored, 1 unstated" in text
    assert "used 2 of" in text
    assert "ignored: asked 2, nobody" in text


def test_violations_and_limits() -> None:
    quota = Rule("quota", lambda envelope: Decision.allow(limits={"memory": "256MiB"}))

    async def beyond(admission: Admission) -> None:
        with pytest.raises(Violation):
            await admission.grant(Grant({"memory": "512MiB"}))

    shown = record(ask(), beyond, hooks=[quota])
    text = words(sheet(shown))
    assert "limit: at most memory 256 MiB, set by quota" in text
    assert "violation memory 512 MiB is beyond the 256 MiB that hook quota allows" in text
    assert "1 violation" in short_delta(shown)
    assert presentation.details(shown, now=NOW)["violations"][0]["bound"] == 256 * 2**20


def test_text_from_records_is_inert() -> None:
    no = Rule("[red]rule[/red]", lambda envelope: Decision.deny("policy", HOSTILE))
    subject = Subject("user", "eve\x1b]0;title\x07", tenant=HOSTILE, roles=[HOSTILE])
    shown = record(
        ask(subject=subject, target=Target("model", HOSTILE), constraints={"engine": HOSTILE}, request_id=HOSTILE),
        hooks=[no],
    )
    for width in (80, 100):
        text = sheet(shown, width) + listing([shown], width)
        assert not set(text) & (set(map(chr, [*range(10), *range(11, 32), *range(127, 160)])) | {"\u202e"})
        assert "[bold]loud[/bold] :smile: evil new line" in words(text)
        assert "[red]rule[/red]" in text
    assert json.loads(json.dumps(presentation.details(shown, now=NOW)))["verdicts"][0]["message"] == HOSTILE


def test_an_entry_is_one_line() -> None:
    fact = lifecycle.Denied("policy", HOSTILE)
    line = presentation.entry_line(Entry("c", 1, "2026-05-01T12:00:00.000000Z", "x", fact, "e" * 36, 0))
    assert "\n" not in line.plain
    assert "\x1b" not in line.plain
    assert line.plain.startswith("2026-05-01 12:00:00Z  eeeeeeeeeeee  denied     x  denied (policy): only [31mred")


def test_the_chain_status() -> None:
    shown = record(ask())
    status = presentation.ChainStatus(4, ("c",), ())
    assert "chain sound 4 entries in 1 chain, all hashes recomputed" in words(sheet(shown, chain=status))
    broken = presentation.ChainStatus(4, ("c",), (Finding("event c/1", "its hash [b]differs"),))
    assert "chain NOT SOUND event c/1: its hash [b]differs" in words(sheet(shown, chain=broken))
    data = [presentation.details(shown, now=NOW, chain=c)["chain"] for c in (status, broken, None)]
    assert [item and item["sound"] for item in data] == [True, False, None]


def test_the_first_and_the_last_entry_of_a_chain_read_well() -> None:
    at = "2026-05-01T12:00:00.000000Z"
    opened = Opened(Process("node-1", "", "", "", 12, 0), "1.2.3")
    said = {
        opened: "a chain was opened by pid 12 on node-1, version 1.2.3",
        Closed(7, 7, 0): "the chain was closed in order, 7 events stored in it",
        Closed(1, 1, 0): "the chain was closed in order, 1 event stored in it",
        Closed(
            9, 7, 2
        ): "the chain was closed in order, 7 events stored in it; 2 events of 9 acknowledged were dropped",
    }
    for data, words_of in said.items():
        line = presentation.entry_line(Entry("c", 0, at, "ledger", data)).plain
        assert line.endswith(f"ledger  {words_of}")
        found = presentation.entry_data(data)
        assert (found["sentence"], found["type"]) == (words_of, data.__struct_config__.tag)


def test_absent_zero_unknown_and_unlimited_stay_apart() -> None:
    async def four(admission: Admission) -> None:
        await admission.grant(Grant({"gpu": 0, "memory": "unknown", "storage": "unlimited"}))

    asked = {"gpu": 1, "memory": "1GiB", "storage": "1GiB", "cpu": 1}
    shown = record(ask(requested=asked, constraints={}), four)
    data = {line["key"]: line["granted"] for line in presentation.details(shown, now=NOW)["resources"]}
    assert data["cpu"] is None
    assert [data[name]["amount"] for name in ("gpu", "memory", "storage")] == [0, "unknown", "unlimited"]


def test_the_short_delta() -> None:
    async def as_asked(admission: Admission) -> None:
        await admission.grant(Grant({}, honoured=["replicas", "memory", "context", "engine"]))

    async def done(admission: Admission) -> None:
        await admission.complete()

    assert short_delta(record(ask())) == "pending"
    assert short_delta(record(ask(), as_asked)) == "as asked"
    assert short_delta(record(ask(), done)) == "granted unknown"
    assert "as asked" in sheet(record(ask(), as_asked))
    assert "unknown" in sheet(record(ask(), done))


def test_the_summary() -> None:
    shown = record(ask(), reduced)
    data = presentation.summary(shown, now=NOW)
    assert data["delta"] == {"equal": 1, "reduced": 2, "ignored": 1, "unstated": 1, "violations": 0}
    assert data["delta_in_words"] == "2 reduced, 1 ignored, 1 unstated"
    assert data["age_ms"] == 3_599_000
    assert data["references"] == {"deployment": "dep-1"}


def test_listings_fit_and_name_everything() -> None:
    records = [record(ask(), then) for then in (reduced, waiting, failed)]
    for width in (80, 100, 200):
        text = listing(records, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert all(said in text for said in ("59 min ago", "acme/user:dana", "deployment:dep-1", "failed", "pending"))
    assert listing([]).strip() == "no envelopes"


@pytest.mark.parametrize(
    ("ms", "said"),
    [(0, "0 ms"), (999, "999 ms"), (1500, "1.5 s"), (185_000, "3 min 5 s"), (7_200_000, "2 h"), (-5, "-5 ms")],
)
def test_spans(ms: int, said: str) -> None:
    assert span(ms) == said

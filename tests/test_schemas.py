"""The published JSON Schemas are those of the code, and what is really sealed and recorded fits them.

``python -m tests.test_schemas`` writes them anew.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import anyio
import jsonschema
import msgspec
import pytest
import rfc8785
from hypothesis import given

from execution_envelope import (
    AdmissionController,
    Ask,
    Candidate,
    Decision,
    Duty,
    EnvelopeError,
    Grant,
    Held,
    Rule,
    Subject,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.envelope import Envelope, canonical, seal
from execution_envelope.ledger import MemoryLedger, verify
from execution_envelope.ledger.chain import Entry
from execution_envelope.lifecycle import EventData, Expired, Late, Revoked, Used
from execution_envelope.reconciliation import Liveness
from execution_envelope.reviewer import Stop
from execution_envelope.testing import START, ask
from tests.strategies import asks

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
SCHEMAS: dict[str, type] = {"envelope": Envelope, "event": Entry}


def generated(name: str) -> str:
    """The schema file's content, in a stable order; `docs/build.py` writes the same."""
    schema = msgspec.json.encode(msgspec.json.schema(SCHEMAS[name]), order="sorted")
    return msgspec.json.format(schema, indent=2).decode() + "\n"


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_files_are_those_of_the_code(name: str) -> None:
    written = (FOLDER / f"{name}.schema.json").read_text()
    assert written == generated(name), (
        "expected the schema of the code; write it anew by `python -m tests.test_schemas`"
    )


@given(asks())
def test_whatever_is_sealed_fits(random: Ask) -> None:
    body = seal(random, id="01890a5d-ac96-774b-bcce-b302099a8057", now=START).body
    VALIDATORS["envelope"].validate(json.loads(body))


VALIDATORS = {name: validator(name) for name in SCHEMAS if (FOLDER / f"{name}.schema.json").exists()}


async def everything() -> MemoryLedger:
    """A ledger that holds every type of event that the seam records."""
    ledger = MemoryLedger()
    answers = {"deny": Decision.deny("policy", "no"), "hold": Decision.hold("ask first")}
    allowed = Decision.allow(limits={"gpu": 2, "region": ["eu"]}, obligations=[Duty("scan", "scan it")])

    def decide(envelope: Any) -> Decision:
        if envelope.execution.kind == "maintenance":
            return Decision("allow", policies=["approvers"])
        return answers.get(envelope.execution.operation, allowed)

    limits = Rule("limits", decide)
    budgets = Budgets(
        [
            Budget(name="gpus", resource="gpu", limit=9),
            Budget(name="day", resource="steps", limit=9, window="day", unknown="admit", mode="shadow"),
        ]
    )
    controller = AdmissionController(ledger, hooks=[limits], budgets=budgets)
    for operation in answers:
        with pytest.raises(EnvelopeError) as refused:
            await controller.begin(ask(operation=operation))
    assert isinstance(refused.value, Held)
    kim = Subject("user", "kim", tenant="acme", roles=["approver"])
    await controller.approve(refused.value.envelope_id or "", by=kim, reason="fine")
    admission = await controller.begin(
        ask(schema="S", body={"password": "x"}, secrets=["password"], idempotency_key="k", facets={"a": ("p", None, 1)})
    )
    await admission.effective({"gpu": 1}, cause="policy", because="one", constraints={"engine": ["a", {"b": None}]})
    await admission.attempt([Candidate("n1", "refused", "full"), Candidate("n2", "tried")], reason="no room")
    await admission.bind("deployment", "d1")
    await admission.leave(failed=("ValueError", "on the way out"))
    with pytest.raises(EnvelopeError):
        await admission.grant(
            Grant(
                {
                    "gpu": 4,
                    "memory": {"amount": "1GiB", "floor": 1, "ceiling": "2GiB", "per": "replica"},
                    "rows": "unknown",
                },
                part="0",
                basis="enforced",
                because={"gpu": ("balancing", "so")},
                honoured=["engine"],
                constraints={"device": "cpu"},
                route={"host": "n1"},
                candidates=[Candidate("n1", "chosen")],
            )
        )
    await admission.ready("0")
    await admission.used({"steps": 1, "output_tokens": "unlimited"}, key="r", how="estimated")
    await admission.observe("unready", rev=7, part="0", reason="draining")
    await admission.observe("ready", rev="18446744073709551616")
    await admission.release("0", reason="scaled down")
    await admission.fail("Crash", "it crashed")
    await admission.used({"steps": 1})
    for end in ("reject", "complete", "cancel"):
        other = await controller.begin(ask())
        await other.oblige("scan", "fulfilled", "clean")
        await (other.reject("NoRoom", "full") if end == "reject" else getattr(other, end)())
    await controller.record(ask(), source="gateway", key="7", began_at=START, ended_at=START, used={"steps": 1}, by="c")
    lost = await controller.begin(ask())
    await lost.bind("job", "j", owner="node")

    async def gone(record: Any) -> Liveness:
        return Liveness.gone("not there")

    await controller.reconcile({"node": gone}, everything=True)
    bad = await controller.begin(ask())
    await bad.bind("job", "k", owner="node")
    await controller.revoke(bad.id, by=kim, reason="it leaks")
    for answer in (Stop.refused("not now"), Stop.stopped("it ended")):
        await controller.carry_out({"node": partial(_answer, answer)})
    assert verify(ledger).sound
    return ledger


async def _answer(answer: Stop, record: Any, why: str) -> Stop:
    return answer


def test_every_event_fits_and_is_canonical() -> None:
    ledger = anyio.run(everything)
    types = set()
    ledger.close()  # which ends the chain
    for chain in ledger.chains():
        for row in ledger.rows(chain.id):
            body = json.loads(row.body)
            VALIDATORS["event"].validate(body)
            assert rfc8785.dumps(body) == row.body
            types.add(body["data"]["type"])
            if row.sealed is not None:
                VALIDATORS["envelope"].validate(json.loads(row.sealed))
                assert rfc8785.dumps(json.loads(row.sealed)) == row.sealed
    # What no call above has recorded.
    for data in (Expired(), Late(Used({"steps": 1}))):
        VALIDATORS["event"].validate(json.loads(canonical(Entry("c", 1, "t", "b", data, "e", 0))))
        types.add(data.type)
    assert types == {"opened", "closed"} | {str(kind.__struct_config__.tag) for kind in get_args(EventData)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("envelope", {"identity": {}}),
        ("envelope", {"token": "x"}),
        ("envelope", {"execution": {"kind": "model.delete", "operation": "x", "target": {"type": "a", "id": "b"}}}),
        ("envelope", {"requested": {"resources": {"gpu": {"amount": "many"}}}}),
        ("event", {"data": {"type": "promoted"}}),
        ("event", {"position": "1"}),
        ("event", {"extra": 1}),
    ],
    ids=str,
)
def test_the_schemas_refuse_what_is_not(name: str, change: dict[str, Any]) -> None:
    if name == "envelope":
        body = json.loads(seal(ask(), id="x", now=START).body)
    else:
        body = json.loads(canonical(Entry("c", 1, "t", "b", Revoked(), "e", 0)))
    VALIDATORS[name].validate(body)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATORS[name].validate(body | change)


if __name__ == "__main__":
    for name in SCHEMAS:
        (FOLDER / f"{name}.schema.json").write_text(generated(name))
        print(FOLDER / f"{name}.schema.json")

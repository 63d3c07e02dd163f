"""Admissions for services in any language: decided by the server, owned by the service, and safe to send again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

from execution_envelope import AdmissionController, Decision, Rule, Subject
from execution_envelope.admission import Admission
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.console.access import Principal
from execution_envelope.console.app import create_app
from execution_envelope.console.limits import MAX_BODY
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import SqliteLedger, verify
from execution_envelope.review import Review
from execution_envelope.testing import FakeClock, FaultyLedger
from tests.console.test_openapi import CHECKS
from tests.strategies import examples

PRINCIPALS = {
    "gateway": Principal("service", "gateway", frozenset({"acme"}), ("requester",), "test"),
    "worker": Principal("service", "worker", frozenset({"acme"}), ("service",), "test"),
    "globex": Principal("service", "globex-gateway", frozenset({"globex"}), ("service",), "test"),
    "all": Principal("service", "all", None, ("service", "auditor"), "test"),
    "person": Principal("user", "dana", None, ("service",), "test"),
    "reader": Principal("service", "looker", None, ("reader",), "test"),
}
ASK: Mapping[str, Any] = {
    "kind": "model.deploy",
    "operation": "serving.deploy_model",
    "target": {"type": "model", "id": "smollm2-135m", "version": "q4"},
    "subject": {
        "type": "user",
        "id": "dana",
        "tenant": "acme",
        "roles": ["operator"],
        "method": "oidc",
        "issuer": "idp",
    },
    "scope": {"purpose": "test"},
    "established": {"project": "research"},
    "requested": {"gpu": {"amount": 2, "floor": 1}, "memory": "2GiB"},
    "constraints": {"engine": "llama.cpp"},
}


class Known:
    def principal(self, token: str) -> Principal | None:
        return PRINCIPALS.get(token)


def decide(envelope: Any) -> Decision:
    if envelope.execution.kind == "maintenance":
        return Decision.allow()
    said = envelope.scope.purpose and envelope.scope.purpose.value
    if said == "forbidden":
        return Decision.deny("role_required", "not for this")
    if said == "unclear":
        return Decision.hold("somebody looks at it")
    return Decision.allow(limits={"gpu": 4})


class Server:
    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.ledger = SqliteLedger(folder / "e.db", clock=self.clock)
        self.faulty = FaultyLedger(self.ledger)
        self.controller = AdmissionController(
            self.faulty,
            hooks=[Rule("policy", decide, kinds=frozenset({"model.deploy", "maintenance"}))],
            component="console",
            clock=self.clock,
            budgets=Budgets([Budget(name="gpus", resource="gpu", limit=10)]),
        )
        review = Review(self.ledger, clock=self.clock)
        self.app = create_app(review, authenticators=[Known()], controller=self.controller)

    def post(self, path: str, said: Any, who: str = "gateway", **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        client = TestClient(self.app, headers={"authorization": f"Bearer {who}", **named})
        return client.post(f"/api/admissions{path}", json=said)

    def events(self, id: str) -> list[tuple[str, str]]:
        stored = self.ledger.read(id)
        assert stored is not None
        return [(event.data.type, event.by) for event in stored.events]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    assert verify(found.ledger).findings == ()
    found.ledger.close()


def test_one_admission_from_the_ask_to_its_end(server: Server) -> None:
    said = server.post("", {**ASK, "bind": {"kind": "deployment", "reference": "d-1"}})
    assert said.status_code == 201, said.text
    answer = said.json()
    assert answer["state"] == "admitted" and not answer["replayed"]
    assert answer["limits"] == {"gpu": 4000} and answer["references"] == {"deployment": "d-1"}
    for path, body in (
        ("effective", {"cause": "default", "because": "as ever", "resources": {"context": 4096}}),
        ("attempt", {"reason": "no room", "candidates": [{"name": "node-1", "outcome": "refused", "reason": "full"}]}),
        (
            "grant",
            {"resources": {"gpu": 1, "memory": "2GiB"}, "because": {"gpu": {"cause": "capacity", "text": "one left"}}},
        ),
        ("bind", {"kind": "pod", "reference": "p-1"}),
        ("ready", {"by": "supervisor"}),
        ("used", {"resources": {"output_tokens": 7}, "key": "r-1"}),
        ("release", {"reason": "drained"}),
        ("complete", {"message": "done"}),
    ):
        stands = server.post(f"/deployment:d-1/{path}", body)
        assert stands.status_code == 200, (path, stands.text)
        # A retry, as when the answer was lost, changes nothing that counts.
        again = server.post(f"/{answer['id']}/{path}", body)
        assert again.status_code == 200, (path, again.text)
        if path != "used":
            assert again.json() == stands.json(), path
    assert stands.json()["state"] == "completed"
    record = anyio.run(server.controller.read, answer["id"])
    assert record.used["output_tokens"].amount == 7
    assert record.envelope.identity.authentication.method == "asserted: oidc of idp"
    assert record.envelope.identity.authentication.issuer == "service:gateway"
    assert (record.envelope.scope.project.provenance, record.envelope.scope.project.by) == ("established", "gateway")
    assert record.envelope.scope.purpose.provenance == "asserted"
    assert record.bound.owner == "gateway"
    assert [by for type, by in server.events(answer["id"]) if type in ("granted", "ready")] == [
        "gateway",
        "gateway/supervisor",
    ]
    assert server.ledger.balances(account="gpus/acme")[0].reserved == 0


def test_it_is_bound_at_once_and_leaving_ends_nothing(server: Server) -> None:
    id = server.post("", ASK).json()["id"]
    assert [type for type, _ in server.events(id)][-1] == "bound"
    assert server.ledger.find("admission", id) == id
    anyio.run(server.controller.reconcile, {})
    assert anyio.run(server.controller.read, id).state == "admitted"


def test_a_key_leads_to_one_admission(server: Server) -> None:
    first = server.post("", ASK, Idempotency_Key="k-1")
    again = server.post("", ASK, Idempotency_Key="k-1")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == {**first.json(), "replayed": True}
    other = server.post("", {**ASK, "requested": {"gpu": 3}}, Idempotency_Key="k-1")
    assert other.status_code == 409 and other.json()["type"].endswith("key-conflict")
    assert server.post("", ASK).json()["id"] != first.json()["id"]


@pytest.mark.parametrize(("ends", "state"), [("reject", "rejected"), ("cancel", "cancelled")])
def test_ends_before_a_grant(server: Server, ends: str, state: str) -> None:
    id = server.post("", ASK).json()["id"]
    body = {"code": "no_room", "message": "no room"} if ends == "reject" else {"message": "not any more"}
    assert [server.post(f"/{id}/{ends}", body).json()["state"] for _ in range(2)] == [state, state]
    assert [type for type, _ in server.events(id)].count(state) == 1
    late = server.post(f"/{id}/grant", {"resources": {"gpu": 1}})
    assert late.status_code == 200 and late.json()["state"] == state  # kept as late
    assert server.events(id)[-2:] != server.events(id)[:2] and server.events(id)[-1][0] in ("late",)


def test_what_is_refused_says_why(server: Server) -> None:
    denied = server.post("", {**ASK, "scope": {"purpose": "forbidden"}})
    assert denied.status_code == 403 and denied.json()["type"].endswith(":denied")
    assert denied.json()["reasons"] == [{"hook": "policy", "code": "role_required", "message": "not for this"}]
    held = server.post("", {**ASK, "scope": {"purpose": "unclear"}})
    assert held.status_code == 403 and held.json()["idempotency_key"] and held.json()["retryable"]
    deferred = server.post("", {**ASK, "scope": {"purpose": "unclear"}}, Prefer="respond-async")
    assert deferred.status_code == 202
    full = [server.post("", {**ASK, "requested": {"gpu": 4}}) for _ in range(3)]
    assert [one.status_code for one in full] == [201, 201, 403]
    assert full[2].json()["reasons"][0]["code"] == "quota_exhausted" and full[2].json()["retryable"]
    for wrong, field in (
        ({"requested": {"gpu": "many"}}, "requested.gpu"),
        ({"kind": "poetry"}, "execution.kind"),
        ({"part_of": "nobody"}, "correlation.part_of"),
    ):
        invalid = server.post("", {**ASK, **wrong})
        assert (invalid.status_code, invalid.json()["field"]) == (422, field)
    assert server.post("", {**ASK, "more": 1}).status_code == 422
    assert server.post("", {**ASK, "check_by": "2027-01-01T00:00:00"}).status_code == 422


def test_a_held_request_goes_on_once_it_is_approved(server: Server) -> None:
    ask = {**ASK, "scope": {"purpose": "unclear"}}
    held = server.post("", ask, Idempotency_Key="k-2").json()

    async def approve() -> None:
        by = Subject("user", "eve", tenant="acme", roles=["operator"])
        await server.controller.approve(held["envelope"], by=by, reason="fine")

    anyio.run(approve)
    admitted = server.post("", ask, Idempotency_Key="k-2")
    assert (admitted.status_code, admitted.json()["id"]) == (201, held["envelope"])


def test_no_service_approves_what_it_asked_itself(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Principal("service", "gateway", frozenset({"acme"}), ("requester", "operator"), "test")
    monkeypatch.setitem(PRINCIPALS, "both", both)
    monkeypatch.setitem(PRINCIPALS, "other", replace(both, id="another"))
    held = server.post("", {**ASK, "scope": {"purpose": "unclear"}}, who="both").json()["envelope"]
    for who, status in (("both", 403), ("other", 200)):
        client = TestClient(server.app, headers={"authorization": f"Bearer {who}"})
        answer = client.post(f"/api/envelopes/{held}/approve", json={"reason": "r"})
        assert answer.status_code == status, who


def test_a_grant_beyond_a_limit_is_recorded_and_said(server: Server) -> None:
    id = server.post("", ASK).json()["id"]
    for _ in range(2):
        beyond = server.post(f"/{id}/grant", {"resources": {"gpu": 5}})
        assert beyond.status_code == 409 and beyond.json()["type"].endswith(":violation")
    assert [type for type, _ in server.events(id)].count("granted") == 1


def test_others_do_not_go_on_with_it(server: Server) -> None:
    id = server.post("", {**ASK, "bind": {"kind": "deployment", "reference": "d-2"}}).json()["id"]
    words = set()
    for reference in (id, "deployment:d-2", "deployment:d-3", "nobody"):
        said = server.post(f"/{reference}/complete", {}, "globex")
        assert said.status_code == 404
        words.add(said.json()["detail"].replace(reference, "X"))
    assert len(words) == 1
    assert server.post(f"/{id}/complete", {}, "worker").status_code == 403
    taken = server.post(
        "",
        {
            **ASK,
            "subject": {"type": "user", "id": "x", "tenant": "globex"},
            "bind": {"kind": "deployment", "reference": "d-2"},
        },
        "globex",
        Idempotency_Key="k-3",
    )
    assert taken.status_code == 409 and id not in taken.text
    assert [type for type, _ in server.events(id)][-1] == "bound"
    # What could not be bound is nobody's, and over.
    assert server.ledger.unfinished() == [id]


@pytest.mark.parametrize(("who", "status"), [("person", 403), ("reader", 403), ("nobody", 401), ("globex", 403)])
def test_only_a_service_asks_and_in_its_tenants(server: Server, who: str, status: int) -> None:
    assert server.post("", ASK, who).status_code == status
    assert server.ledger.newest(9) == []


def test_a_ledger_that_is_away_is_503_and_nothing_is_left_open(server: Server) -> None:
    for fail_at in range(1, 12):
        server.faulty.fail_at, server.faulty.calls = fail_at, 0
        said = server.post("", ASK, Idempotency_Key=f"away-{fail_at}")
        server.faulty.fail_at = None
        if said.status_code == 201:
            break
        assert said.status_code == 503 and said.json()["retryable"], said.text
        assert said.headers["retry-after"] == "1"
        again = server.post("", ASK, Idempotency_Key=f"away-{fail_at}")
        assert again.status_code in (201, 409), again.text
        if again.status_code == 201:
            server.post(f"/{again.json()['id']}/cancel", {})
    else:
        pytest.fail("expected it to be admitted at last")
    server.post(f"/{said.json()['id']}/cancel", {})
    anyio.run(server.controller.reconcile, {})
    assert server.ledger.unfinished() == []
    assert server.ledger.balances(account="gpus/acme")[0].reserved == 0


def test_wrong_bodies_are_the_clients_fault(server: Server) -> None:
    client = TestClient(server.app, headers={"authorization": "Bearer gateway", "content-type": "application/json"})
    for path in ("", "/x/grant", "/x/complete"):
        for body in (
            b"",
            b"nonsense",
            b"[" * 99_999,
            b'"\\ud800"',
            b"\xff",
            b"{}" if path == "" else b"[]",
            b'{"a":1}',
        ):
            said = client.post(f"/api/admissions{path}", content=body)
            assert 400 <= said.status_code < 500, (path, body[:9], said.text)
        assert client.post(f"/api/admissions{path}", content=b" " * (MAX_BODY + 1)).status_code == 413


def test_a_server_without_a_controller_decides_nothing(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "e.db")
    app = create_app(Review(ledger, clock=FakeClock()), authenticators=[Known()])
    client = TestClient(app, headers={"authorization": "Bearer gateway"})
    assert client.post("/api/admissions", json=ASK).status_code == 409
    assert client.post("/api/admissions/x/complete", json={}).status_code == 409
    ledger.close()


def test_every_answer_is_described(tmp_path: Path) -> None:
    server = Server(tmp_path)
    allowed = {"authorization": "Bearer all"}
    id = server.post("", ASK, "all").json()["id"]
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", server.app, headers=allowed)
    operations = [found.ok() for found in schema.get_all_operations()]
    ours = [one for one in operations if one.path.startswith("/api/admissions")]
    assert len(ours) == 13
    for operation in ours:

        @given(case=operation.as_strategy())
        @settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case: Any) -> None:
            if "reference" in (case.path_parameters or {}) and len(str(case.path_parameters["reference"])) % 2:
                case.path_parameters["reference"] = id
            case.call_and_validate(headers=allowed, checks=CHECKS)

        check()
    server.ledger.close()


def test_what_a_server_that_died_did_not_bind_is_taken_up_by_the_retry(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = Admission.bind

    async def dies(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable("gone")

    # The end cannot be recorded either: as when the process is killed between its two commits.
    monkeypatch.setattr(Admission, "bind", dies)
    monkeypatch.setattr(Admission, "leave", dies)
    assert server.post("", ASK, Idempotency_Key="k-2").status_code == 503
    monkeypatch.setattr(Admission, "bind", bind)
    # Another service of the tenant, with the same key and request, does not get it.
    assert server.post("", ASK, who="worker", Idempotency_Key="k-2").status_code == 409
    again = server.post("", ASK, Idempotency_Key="k-2")
    assert again.status_code == 201 and again.json()["replayed"] and list(again.json()["references"]) == ["admission"]
    id = again.json()["id"]
    assert [type for type, _ in server.events(id)].count("admitted") == 1
    assert server.post("", ASK, Idempotency_Key="k-2").json() == again.json()
    assert server.post(f"/{id}/complete", {}).json()["state"] == "completed"


def test_the_name_of_the_server_itself_is_no_services(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would own all that the server recorded for others.
    id = server.post("", ASK).json()["id"]
    monkeypatch.setitem(PRINCIPALS, "console", Principal("service", "console", None, ("service",), "test"))
    assert server.post(f"/{id}/complete", {}, who="console").status_code == 403
    assert server.post("", ASK, who="console").status_code == 403


def test_a_server_reconciles_by_itself(server: Server) -> None:
    held = server.post("", {**ASK, "scope": {"purpose": "unclear"}}, Idempotency_Key="k-3")
    id = held.json()["envelope"]
    server.clock.advance(days=2)
    app = create_app(Review(server.ledger, clock=server.clock), authenticators=[Known()], keeper=server.controller)
    with TestClient(app):
        for _ in range(200):
            if server.events(id)[-1][0] == "expired":
                break
            time.sleep(0.02)
    assert server.events(id)[-1] == ("expired", "reconcile")

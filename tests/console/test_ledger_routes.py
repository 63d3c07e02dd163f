"""Hostile and wrong clients of the ledger over HTTP: 4xx and never 5xx, nothing of others seen, nothing forged kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import lifecycle
from execution_envelope.console.asserted import Service
from execution_envelope.console.limits import MAX_BODY
from execution_envelope.envelope import Subject, Target, canonical, sha256
from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger import SqliteLedger, open_ledger, verify, wire
from execution_envelope.ledger.commit import Commit, SequenceConflict
from execution_envelope.ledger.projection import Lag
from execution_envelope.ledger.remote import RemoteLedger
from execution_envelope.ledger.remote_http import TOKEN, TOKEN_FILE, address
from execution_envelope.ledger.rollups import Question
from execution_envelope.process import current
from execution_envelope.query import Query
from execution_envelope.testing import START
from execution_envelope.testing.commits import admission_of, budgeted, commit_of, raises, reservation_of, sealed_ask
from tests import served
from tests.served import Served, entry

#: Tokens: of services, and of others.
TOKENS = {
    "acme": ("service:acme-backend", ["acme"], "service"),
    "acme-2": ("service:other-backend", ["acme"], "service"),
    "globex": ("service:globex-backend", ["globex"], "service"),
    "person": ("user:dana", None, "service"),
    "reader": ("user:rita", ["acme"], "reader"),
    "auditor": ("user:ada", None, "auditor"),
    "requester": ("service:requester", None, "requester"),
    "slash": ("service:a/b", None, "service"),
}


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteLedger]:
    with closing(SqliteLedger(tmp_path_factory.mktemp("hostile") / "ledger.db")) as ledger:
        ledger.migrate()
        yield ledger
        assert verify(ledger).findings == ()


@pytest.fixture(scope="module")
def server(behind: SqliteLedger, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    entries = [entry(name, subject, tenants, role) for name, (subject, tenants, role) in TOKENS.items()]
    with Served(behind, tmp_path_factory.mktemp("tokens"), *entries) as server:
        yield server


@pytest.fixture
def client(server: Served) -> TestClient:
    return TestClient(server.app, raise_server_exceptions=True)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def ledger_of(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], RemoteLedger]]:
    ledgers: dict[str, RemoteLedger] = {}

    def of(token: str) -> RemoteLedger:
        if token not in ledgers:
            ledgers[token] = RemoteLedger(server.url)
            # Each has a token of its own, for as long as the test runs.
            ledgers[token]._server._headers = lambda: bearer(token)  # type: ignore[method-assign]
        return ledgers[token]

    yield of
    for ledger in ledgers.values():
        ledger.close()


def opened(client: TestClient, token: str = "acme") -> str:
    said = client.post(
        "/api/ledger/sessions",
        content=msgspec.json.encode(wire.Opening(wire.PROTOCOL, current())),
        headers=bearer(token),
    )
    assert said.status_code == 200, said.text
    id: str = said.json()["session"]
    return id


# Who may


@pytest.mark.parametrize("token", ["person", "reader", "auditor", "slash", "requester"])
def test_only_services_write(client: TestClient, token: str) -> None:
    said = client.post("/api/ledger/sessions", content=b"{}", headers=bearer(token))
    assert said.status_code == 403


@pytest.mark.parametrize("token", ["", "nobody", served.TOKEN[:-1]])
def test_without_a_token_there_is_nothing(server: Served, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, token)
    with closing(open_ledger(server.url)) as ledger, raises(LedgerUnavailable) as away:
        ledger.commit(admission_of(sealed_ask()))
    assert not away[0].retryable and (token == "" or token not in str(away[0]))


WHOLE = "cursor attempted checkpoints chains moment rows steps events_of splits strays key_rows references families"
WHOLE += " closings count tampered_schema segments exports"


@pytest.mark.parametrize("path", WHOLE.split())
@pytest.mark.parametrize("token", ["acme", "reader", "person"])
def test_what_belongs_to_no_tenant_is_for_auditors_of_all(client: TestClient, token: str, path: str) -> None:
    query = {"consumer": "x", "limit": 1, "chain": "x", "size": 1, "envelopes": "W10=", "types": "W10="}
    assert client.get(f"/api/ledger/{path}", params=query, headers=bearer(token)).status_code == 403
    assert client.get(f"/api/ledger/{path}", params=query, headers=bearer("auditor")).status_code == 200


def test_a_second_tenant_sees_nothing_of_the_first(
    behind: SqliteLedger, ledger_of: Callable[[str], RemoteLedger]
) -> None:
    parent = sealed_ask(idempotency_key="tenants")
    child = sealed_ask(part_of=parent.envelope.id)
    bound = lifecycle.Bound("deployment", "tenants", "acme-backend", "2026-05-01T12:00:00.000000Z")
    acme, globex = ledger_of("acme"), ledger_of("globex")
    acme.commit(admission_of(parent, bound), admission_of(child))
    acme.commit(reservation_of(reserved := sealed_ask(), 3))
    id, key = parent.envelope.id, parent.key_digest or ""
    chain = acme.chain_of(id, 0)
    assert chain is not None

    def seen(ledger: RemoteLedger) -> list[Any]:
        return [
            ledger.read(id) and True,
            ledger.find("deployment", "tenants"),
            ledger.key(key) and True,
            ledger.children(id),
            id in ledger.newest(100),
            id in ledger.unfinished(),
            ledger.chain_of(id, 0),
            ledger.writer(chain),
            ledger.lease(chain) is not None or None,
            list(ledger.rows_of(id)) != [],
            [one.account for one in ledger.balances()],
            ledger.projection().get(id) and True,
            id in [row.id for row in ledger.projection().search(None, limit=100).rows],
            id in [row.id for row in ledger.projection().stream(Query.parse("tenant=acme", START))],
            id in [row.id for row in ledger.projection().search(None, limit=9, tenants=frozenset({"acme"})).rows],
        ]

    nothing = [None, None, None, [], False, False, None, None, None, False, [], None, False, False, False]
    assert seen(globex) == nothing
    mine = seen(acme)
    assert mine[:8] == [True, id, True, [child.envelope.id], True, True, chain, current()]
    assert mine[9:] == [True, ["gpus/acme"], True, True, True, True]
    # Another service of the same tenant sees it, and has none of its own.
    assert seen(ledger_of("acme-2"))[:6] == [True, id, True, [child.envelope.id], True, False]
    assert globex.holders(_key(), 9) == ([], 0) and acme.holders(_key(), 9)[0][0].envelope == reserved.envelope.id
    with raises(LedgerUnavailable):
        globex.projection().open()
    covered = globex.projection().coverage()
    assert {one.count for one in covered.of.values()} == {0} and (covered.envelopes, covered.attempted) == (None, None)
    assert acme.projection().coverage().of["undecided"].count >= 3
    assert globex.findings_of(id) == [] and globex.projection().lag() == Lag(0, 0)
    asked = Question("2026-01-01", "2026-12-31", ("tenant",))
    assert {group.group["tenant"] for group in acme.projection().totals(asked).totals} == {"acme"}
    for narrow in (asked, asked._replace(where={"tenant": "acme"}), asked._replace(tenants=frozenset({"acme"}))):
        assert list(globex.projection().totals(narrow).totals) == []


def _key() -> Any:
    from execution_envelope.testing.commits import GPUS

    return GPUS


# Forged


def refused(ledger: RemoteLedger, commit: Commit, kind: type[Any] = InvalidField, match: str = ".*") -> None:
    with pytest.raises(kind, match=match):
        ledger.commit(commit)


def test_nothing_forged_is_stored(behind: SqliteLedger, ledger_of: Callable[[str], RemoteLedger]) -> None:
    acme, before = ledger_of("acme"), behind.count()
    good = sealed_ask()
    commit = admission_of(good)
    first, *rest = commit.facts
    assert isinstance(first, lifecycle.Sealed) and commit.sealed is not None
    changed = msgspec.structs.replace

    def with_body(body: bytes) -> Commit:
        sealed, families = replace(good, body=body, digest=sha256(body)), json.loads(body)
        same = [canonical(families.get(name, {})) for name in ("execution", "scope", "requested")]
        request = sha256(b"[%b,%b,%b]" % (same[0], same[1], same[2]))
        return replace(commit, sealed=sealed, facts=[changed(first, digest=sha256(body), request=request), *rest])

    plain = json.loads(good.body)
    spaced = json.dumps(plain).encode()
    other = {**plain, "correlation": {**plain["correlation"], "id": sealed_ask().envelope.id}}
    float_ = {**plain, "requested": {**plain["requested"], "constraints": {"engine": {"value": 1.5}}}}
    resource = {**plain, "requested": {"resources": {"magic": {"amount": 1}}}}
    secret = {**plain, "scope": {**plain["scope"], "project": {"value": "ghp_" + "a1B2" * 9}}}
    extra = {**plain, "more": 1}
    hints = {f"h{number}": {"value": "x"} for number in range(33)}
    many = {**plain, "scope": {**plain["scope"], "hints": hints}}
    tenant = {**plain, "identity": {**plain["identity"], "tenant": "globex"}}
    forged = [
        replace(commit, facts=[changed(first, digest="0" * 64), *rest]),
        replace(commit, facts=[changed(first, request="0" * 64), *rest]),
        replace(commit, facts=[changed(first, key="0" * 64), *rest]),
        replace(commit, facts=rest),
        replace(commit, facts=[first, first, *rest]),
        replace(commit, sequence=1),
        replace(commit, sealed=None),
        replace(commit, envelope="x" * 36),
        replace(commit, at="yesterday"),
        replace(commit, by=""),
        replace(commit, by="x" * 300),
        replace(commit, by="ghp_" + "a1B2" * 9),
        replace(commit, facts=[first, lifecycle.Admitted(), lifecycle.Error("key ghp_" + "a1B2" * 9)]),
        replace(commit, facts=[first, lifecycle.Admitted(), lifecycle.Effective("default", "x", {}, {"a": 0.5})]),
        *(with_body(canonical(each)) for each in (other, float_, resource, secret, extra, many, tenant)),
        with_body(spaced),
        with_body(b"{}"),
    ]
    for number, one in enumerate(forged):
        with pytest.raises(InvalidField):
            pytest.fail(f"{number} was stored: {acme.commit(one)}")
    from execution_envelope.errors import IllegalTransition

    for fact in (lifecycle.Granted({}, "reserved"), lifecycle.Late(lifecycle.Ready())):
        with raises(IllegalTransition):
            acme.commit(replace(commit, facts=[first, fact]))
    # A budget: nothing is given back that is not held, nothing reserved past the limit, no account of others.
    for entry_ in (budgeted(-5), budgeted(0, -1), budgeted(1, key=_key()._replace(account="gpus/globex"))):
        with raises(InvalidField):
            acme.commit(admission_of(good, entry_))
    with raises(InvalidField):
        acme.commit(replace(reservation_of(sealed_ask(), 3), within=frozenset()))
    # Of a key that was cut, or that held a credential, the digest is of the whole.
    acme.commit(admission_of(sealed_ask(idempotency_key="k" * 300)))
    acme.commit(admission_of(sealed_ask(idempotency_key="ghp_" + "a1B2" * 9)))
    acme.commit(admission_of(good))
    acme.commit(admission_of(child := sealed_ask()))
    with raises(IllegalTransition):
        acme.commit(commit_of(child, 2, lifecycle.Failed("x", "before any grant")))
    with raises(SequenceConflict):
        acme.commit(commit_of(child, 1, lifecycle.Ready()))
    # Its own opening and four admissions.
    assert behind.count() == before + (9 if acme._writer._store._chain else 0)  # type: ignore[attr-defined]


def test_facts_of_another_service_or_tenant_are_refused(
    behind: SqliteLedger, ledger_of: Callable[[str], RemoteLedger]
) -> None:
    sealed = sealed_ask()
    ledger_of("acme").commit(admission_of(sealed))
    refused(ledger_of("acme-2"), commit_of(sealed, 2, lifecycle.Ready()), match="another service")
    refused(ledger_of("globex"), commit_of(sealed, 2, lifecycle.Ready()), SequenceConflict)
    refused(ledger_of("globex"), commit_of(sealed_ask(), 2, lifecycle.Ready()), SequenceConflict)
    theirs = sealed_ask(subject=Subject("user", "dana", tenant="globex"), part_of=sealed.envelope.id)
    refused(ledger_of("globex"), admission_of(theirs), match="part_of")
    ours = sealed_ask()
    behind.commit(admission_of(ours))  # by a process that has the database
    refused(ledger_of("acme"), commit_of(ours, 2, lifecycle.Ready()), match="another service")
    stored = behind.read(sealed.envelope.id)
    assert stored is not None and len(stored.events) == 2


def test_the_record_says_which_service_it_was(behind: SqliteLedger, ledger_of: Callable[[str], RemoteLedger]) -> None:
    acme, sealed = ledger_of("acme"), sealed_ask()
    acme.commit(admission_of(sealed))
    for sequence, by in enumerate(("acme-backend", "acme-backend/resolver", "globex-backend/x"), start=2):
        acme.commit(replace(commit_of(sealed, sequence, lifecycle.Ready(by)), by=by))
    stored, theirs = behind.read(sealed.envelope.id), acme.read(sealed.envelope.id)
    assert stored is not None and theirs is not None
    assert [event.by for event in stored.events] == [
        "acme-backend/test",
        "acme-backend/test",
        "acme-backend",
        "acme-backend/acme-backend/resolver",
        "acme-backend/globex-backend/x",
    ]
    assert [event.by for event in theirs.events] == [
        "test",
        "test",
        "acme-backend",
        "acme-backend/resolver",
        "globex-backend/x",
    ]


@given(
    service=st.from_regex(r"[a-z/]{1,6}", fullmatch=True).filter(lambda name: "/" not in name),
    by=st.text("ab/", min_size=1),
)
@settings(max_examples=200)
def test_every_component_has_a_name_of_its_own(service: str, by: str) -> None:
    name = wire.named(service, by)
    assert wire.unnamed(service, name) == by
    assert name == service or name.startswith(f"{service}/")


def test_sessions_are_their_services_own(client: TestClient) -> None:
    id = opened(client)
    for token, status in (("acme-2", 404), ("globex", 404), ("acme", 200)):
        said = client.post(f"/api/ledger/sessions/{id}/alive", content=b'{"dropped":0}', headers=bearer(token))
        assert said.status_code == status
    said = client.post(f"/api/ledger/sessions/{id}/end", content=b'{"dropped":0}', headers=bearer("acme"))
    assert said.status_code == 200
    again = client.post(f"/api/ledger/sessions/{id}/alive", content=b'{"dropped":0}', headers=bearer("acme"))
    assert (again.status_code, again.json()["type"]) == (404, "urn:execution-envelope:problem:no-session")


def test_there_is_room_for_so_many_sessions(
    client: TestClient, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from execution_envelope.console import clients

    shared = server.app.state.console.clients
    monkeypatch.setattr(clients, "MAX_OF_SERVICE", 2)
    ids = [
        opened(client, "globex")
        for _ in range(2 - sum(s.service.name == "globex-backend" for s in shared._sessions.values()))
    ]
    body = msgspec.json.encode(wire.Opening(wire.PROTOCOL, current()))
    full = client.post("/api/ledger/sessions", content=body, headers=bearer("globex"))
    assert full.status_code == 503
    # One that nobody heard of for long makes room, and its chain is not ended for it.
    for one in shared._sessions.values():
        if one.service.name == "globex-backend":
            one.heard -= clients.SILENT + 1
    assert client.post("/api/ledger/sessions", content=body, headers=bearer("globex")).status_code == 200
    assert (
        client.post(
            f"/api/ledger/sessions/{ids[0]}/alive", content=b'{"dropped":0}', headers=bearer("globex")
        ).status_code
        == 404
    )


# Malformed


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"number":1,"submissions":[{"number":1,"commits":[{"envelope":"\\ud800"}]}]}',
        b'{"number":1e400,"submissions":[]}',
        b'{"number":1,"submissions":"x"}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize(
    "path", ["sessions", "groups", "settled", "alive", "note", "currency", "cursor", "checkpoints/1"]
)
def test_a_malformed_body_is_the_clients_fault(client: TestClient, path: str, body: bytes) -> None:
    if path in ("groups", "settled", "alive"):
        path = f"sessions/{opened(client, served.TOKEN)}/{path}"
    said = client.post(f"/api/ledger/{path}", content=body, headers=bearer(served.TOKEN))
    assert 400 <= said.status_code < 500, said.text
    assert said.headers["content-type"] == "application/problem+json"


def test_an_oversized_body_is_refused(client: TestClient) -> None:
    said = client.post("/api/ledger/note", content=b" " * (MAX_BODY + 1), headers=bearer("acme"))
    assert said.status_code == 413


def test_facts_too_large_or_too_deep_are_refused(ledger_of: Callable[[str], RemoteLedger]) -> None:
    acme, sealed = ledger_of("acme"), sealed_ask()
    acme.commit(admission_of(sealed))
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    refused(acme, commit_of(sealed, 2, lifecycle.Effective("default", "x", {}, {"a": deep})), match="levels")
    refused(acme, commit_of(sealed, 2, lifecycle.Error("x" * 2**20)), match="bytes")
    refused(acme, commit_of(sealed, 2, lifecycle.Error("x" * wire.MAX_BODY)), match="bytes")
    refused(acme, commit_of(sealed, 2, *[lifecycle.Ready(str(n)) for n in range(1001)]), match="facts")


def test_another_protocol_is_refused_by_name(client: TestClient) -> None:
    body = json.dumps({"protocol": 99, "future": True}).encode()
    said = client.post("/api/ledger/sessions", content=body, headers=bearer("acme"))
    assert said.status_code == 503 and "protocol 1" in said.json()["detail"]
    assert said.json()["refusal"].get("retryable", False) is False


NUMBERS = st.integers(-(2**70), 2**70)
TEXTS = st.text(max_size=20)


@given(
    path=st.sampled_from(
        [*WHOLE.split(), "read", "find", "key", "children", "newest", "holders", "balances", "own", "lease"]
    ),
    query=st.dictionaries(
        st.sampled_from(
            [
                "envelope",
                "kind",
                "reference",
                "digest",
                "limit",
                "before",
                "chain",
                "sequence",
                "account",
                "window",
                "resource",
                "after",
                "until",
                "size",
                "last",
                "consumer",
                "envelopes",
                "types",
            ]
        ),
        NUMBERS | TEXTS,
    ),
)
@settings(max_examples=150, deadline=None)
def test_no_question_is_an_error_of_the_server(server: Served, path: str, query: dict[str, Any]) -> None:
    client = TestClient(server.app, raise_server_exceptions=True)
    said = client.get(f"/api/ledger/{path}", params=query, headers=bearer(served.TOKEN))
    assert said.status_code in (200, 400, 422), said.text


# The client


@pytest.mark.parametrize(
    "url",
    [
        "http://ledger.example",
        "https://token@ledger.example",
        "https://u:p@ledger.example",
        "https://ledger.example/?token=x",
        "https://ledger.example/#x",
        "https://",
        "http://127.0.0.1.example",
        "http://[::2]:80",
    ],
)
def test_an_address_that_would_show_the_token_is_refused(url: str) -> None:
    with raises(InvalidField) as refusal:
        open_ledger(url)
    assert "token@" not in str(refusal[0]) and "u:p" not in str(refusal[0])


def test_addresses() -> None:
    assert address("https://ledger.example:8443/envelopes/") == "https://ledger.example:8443/envelopes"
    assert address("http://localhost:8484") == "http://localhost:8484"
    assert address("http://[::1]:8484/") == "http://[::1]:8484"


def test_the_token_may_be_in_a_file(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{served.TOKEN}\n")
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setenv(TOKEN_FILE, str(file))
    with closing(open_ledger(server.url, read_only=True)) as ledger:
        assert ledger.count() > 0
        with raises(LedgerUnavailable):
            ledger.commit(admission_of(sealed_ask()))
        file.unlink()
        with raises(LedgerUnavailable) as away:
            ledger.count()
    assert "cannot be read" in str(away[0])


def test_a_server_that_is_something_else_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "x")
    for status, content in ((404, b"no"), (200, b"<html>"), (302, b"")):
        with closing(RemoteLedger("https://ledger.example")) as ledger:
            transport = httpx.MockTransport(lambda request: httpx.Response(status, content=content))  # noqa: B023
            ledger._server._client = httpx.Client(base_url="https://ledger.example/api/ledger/", transport=transport)
            with raises(LedgerUnavailable) as away:
                ledger.count()
            assert not away[0].retryable


def test_what_may_be_stored_already_is_checked_as_everything_else(
    behind: SqliteLedger, ledger_of: Callable[[str], RemoteLedger], client: TestClient
) -> None:
    acme = ledger_of("acme")
    acme.commit(reservation_of(sealed := sealed_ask(), 3))
    ledger_of("globex").commit(
        replace(
            admission_of(
                sealed_ask(subject=Subject("user", "gil", tenant="globex")),
                budgeted(4, key=_key()._replace(account="gpus/globex")),
            ),
            within=frozenset({"gpus/globex"}),
        )
    )
    session, numbers = opened(client), count(1)

    def said(commit: Commit, **how: bool) -> Any:
        number = next(numbers)
        group = wire.Group(number, (wire.SentSubmission(number, (wire.sent(commit),), **how),))
        path = f"/api/ledger/sessions/{session}/groups"
        answer = client.post(path, content=msgspec.json.encode(group), headers=bearer("acme"))
        return answer.json()["outcomes"][0].get("refused", {}).get("type")

    before = {one.account: one.reserved for one in behind.balances()}
    for how in ({"doubtful": True}, {"relaxed": True}, {"relaxed": True, "doubtful": True}):
        for entry_ in (budgeted(-9), budgeted(-1, key=_key()._replace(account="gpus/globex"))):
            assert said(commit_of(sealed, 1, entry_), **how) == "invalid-field", (how, entry_)
    assert {one.account: one.reserved for one in behind.balances()} == before
    # What is stored already stays what it is, and what is not is recorded behind the rest.
    assert said(commit_of(sealed, 1, lifecycle.Attempt((), "no room")), doubtful=True) is None
    stored = behind.read(sealed.envelope.id)
    assert stored is not None and stored.events[-1].data == lifecycle.Attempt((), "no room")


def test_who_approves_or_revokes_was_admitted_to(
    behind: SqliteLedger, ledger_of: Callable[[str], RemoteLedger]
) -> None:
    acme = ledger_of("acme")

    def request(operation: str, target: str, said: str, who: str = "boss", *facts: lifecycle.EventData) -> str:
        asked = sealed_ask(
            kind="maintenance",
            operation=operation,
            target=Target("envelope", target, said),
            subject=Subject("user", who, tenant="acme"),
            requested={},
        )
        first = lifecycle.Sealed(asked.digest, asked.request_digest, asked.key_digest)
        acme.commit(replace(admission_of(asked), facts=[first, *(facts or [lifecycle.Admitted()])]))
        return asked.envelope.id

    def held() -> Any:
        sealed = sealed_ask(subject=Subject("user", "dana", tenant="acme"))
        first = lifecycle.Sealed(sealed.digest, sealed.request_digest, sealed.key_digest)
        acme.commit(replace(admission_of(sealed), facts=[first, lifecycle.Held("unclear", "?")]))
        return sealed

    one, other = held(), held()
    id, approve, revoke = one.envelope.id, "envelope.approve", "envelope.revoke"
    forged = [
        ("user:boss", sealed_ask().envelope.id),
        ("user:boss", "nonsense"),
        ("user:boss", id),
        ("user:boss", request(approve, other.envelope.id, "approve")),
        ("user:boss", request(approve, id, "deny")),
        ("user:boss", request(revoke, id, "approve")),
        ("user:boss", request(approve, id, "approve", "other")),
        ("user:boss", request(approve, id, "approve", "boss", lifecycle.Denied("role_required", "no"))),
        ("user:dana", request(approve, id, "approve", "dana")),  # who asked for it
    ]
    for approver, admission in forged:
        refused(acme, commit_of(one, 2, lifecycle.Approval(approver, "approve", "x", admission)), match="approval")
    good = request(approve, id, "approve")
    acme.commit(commit_of(one, 2, lifecycle.Approval("user:boss", "approve", "x", good)))
    acme.commit(admission_of(live := sealed_ask()))
    asked = live.envelope.id
    refused(acme, commit_of(live, 2, lifecycle.Revoked()), match="review")
    for said in (
        lifecycle.Review("user:boss", "1", "revoke", admission=good),
        lifecycle.Review("user:boss", "1", "revoke", admission=request(revoke, asked, "revoke", "other")),
        lifecycle.Review("user:boss", "1", "revoke"),
    ):
        refused(acme, commit_of(live, 2, said), match="review")
    for said in (
        lifecycle.Review("user:boss", "1", "revoke", admission=request(revoke, asked, "revoke")),
        lifecycle.Review("nightly", "1", "flag"),
    ):
        acme.commit(commit_of(live, len(behind.read(asked).events), said))  # type: ignore[union-attr]
    acme.commit(commit_of(live, 4, lifecycle.Revoked()))
    # Nor in the commit that seals it, where nothing stands on the record yet.
    late = sealed_ask()
    approval = lifecycle.Approval("user:boss", "approve", "x", good)
    first = lifecycle.Sealed(late.digest, late.request_digest, late.key_digest)
    facts = [first, lifecycle.Held("unclear", "?"), approval]
    refused(acme, replace(admission_of(late), facts=facts), match="approval")


def test_an_account_is_of_the_tenant_named_first() -> None:
    acme, all_ = Service("s", frozenset({"acme"})), Service("s", None)
    for account, shown, kept in (
        ("gpus/acme", True, True),
        ("gpus/acme/research", True, True),
        ("gpus/globex/acme", False, False),  # a project of another tenant
        ("gpus/acme-2", False, False),
        ("acme", False, True),  # what all use together is entered, and not shown
    ):
        assert (acme.shows(account), acme.keeps(account)) == (shown, kept), account
        assert all_.shows(account) and all_.keeps(account)


def test_no_proxy_reads_the_token_in_the_clear(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(TOKEN, served.TOKEN)
    with closing(open_ledger(server.url)) as ledger:
        assert ledger.count() >= 0

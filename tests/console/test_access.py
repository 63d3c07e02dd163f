"""Who may look: token file, OpenID Connect, signing in, forms, limits, and what every answer says to a browser."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import HTTPException
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Ask, Decision, Rule, Subject, Target
from execution_envelope.console.access import ROLES, Principal
from execution_envelope.console.app import create_app
from execution_envelope.console.headers import OverHttps
from execution_envelope.console.limits import MAX_BODY, RateLimits
from execution_envelope.console.oidc import FRESH, LASTS, RETRY, OidcIssuer
from execution_envelope.console.sessions import COOKIE, IDLE, LONGEST, MAX_OF_ONE, MAX_SESSIONS, Sessions
from execution_envelope.console.tokens import TokenFile, add_token
from execution_envelope.errors import Held, InvalidField
from execution_envelope.review import Review

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
NAMED = f"[[token]]\nsha256='{'0' * 64}'\nsubject='user:a'\n"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def token(
    path: Path, subject: str = "user:dana", tenants: Any = ("acme",), roles: Any = ("operator",), **more: Any
) -> str:
    tenants = tenants if isinstance(tenants, str) else list(tenants)
    return add_token(path, subject=subject, tenants=tenants, roles=list(roles), expires=more.get("expires"))


def approving(envelope: Any) -> Decision | None:
    if envelope.execution.kind != "maintenance":
        return Decision.hold("a person looks at it")
    return None if "operator" in envelope.identity.roles else Decision.deny("role_required", "only operators approve")


class Server:
    """A console over a ledger with one held request of each of two tenants."""

    def __init__(self, folder: Path, clock: Clock, **options: Any) -> None:
        self.tokens = folder / "tokens.toml"
        self.controller = AdmissionController.open(
            f"sqlite:///{folder / 'e.db'}",
            hooks=[Rule("policy", approving, kinds=frozenset({"inference", "maintenance"}))],
            clock=clock,
        )
        self.held = {tenant: anyio.run(self.hold, tenant) for tenant in ("acme", "globex")}
        self.dana = token(self.tokens)
        self.app = create_app(
            Review(self.controller.ledger, clock=clock),
            authenticators=[TokenFile(self.tokens, clock=clock)],
            controller=self.controller,
            **options,
        )

    async def hold(self, tenant: str) -> str:
        ask = Ask(
            kind="inference",
            operation="chat",
            subject=Subject("user", "sam", tenant=tenant),
            target=Target("model", "m"),
            requested={"gpu": 1},
        )
        with pytest.raises(Held) as held:
            await self.controller.begin(ask)
        assert held.value.envelope_id is not None
        return held.value.envelope_id

    def client(self, bearer: str | None = None, **options: Any) -> TestClient:
        headers = {} if bearer is None else {"authorization": f"Bearer {bearer}"}
        return TestClient(self.app, headers=headers, **options)


@pytest.fixture
def server(tmp_path: Path, clock: Clock) -> Iterator[Server]:
    found = Server(tmp_path, clock)
    yield found
    anyio.run(found.controller.aclose)


# Tokens


def test_a_token_is_known_by_its_digest_and_kept_nowhere(server: Server) -> None:
    assert server.dana not in server.tokens.read_text()
    assert server.tokens.stat().st_mode & 0o077 == 0
    assert server.client(server.dana).get("/api/me").json() == {
        "subject": "user:dana",
        "tenants": ["acme"],
        "roles": ["operator"],
        "rights": ["approve", "read", "revoke"],
    }


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer nope", "Basic ZGFuYTp4", "bearer\tx", "Bearer " + "x" * 9000]
)
def test_nobody_is_known_by_anything_else(server: Server, header: str) -> None:
    answer = server.client().get("/api/me", headers={"authorization": header})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_no_token_is_taken_from_a_url(server: Server) -> None:
    for name in ("token", "access_token", "authorization", "bearer"):
        assert server.client().get("/api/me", params={name: server.dana}).status_code == 401
    assert server.client().post(f"/signin?token={server.dana}").status_code == 422


def test_a_token_ends_with_its_time_its_entry_and_its_file(server: Server, clock: Clock) -> None:
    short = token(server.tokens, expires=NOW + timedelta(days=1))
    assert server.client(short).get("/api/me").status_code == 200  # taken up without a restart
    clock.now += timedelta(days=1)
    assert server.client(short).get("/api/me").status_code == 401
    assert server.client(server.dana).get("/api/me").status_code == 200
    server.tokens.write_text(server.tokens.read_text() + "[[token]]\n")
    assert server.client(server.dana).get("/api/me").status_code == 401  # a broken file lets nobody in
    server.tokens.unlink()
    assert server.client(server.dana).get("/api/me").status_code == 401


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[[token]]\nsha256='zz'\nsubject='user:a'\ntenants=[]\nroles=[]", "token[0].sha256"),
        (f"[[token]]\nsha256='{'0' * 64}'\nsubject='a'\ntenants=[]\nroles=[]", "token[0].subject"),
        (f"[[token]]\nsha256='{'0' * 64}'\nsubject='user:a'\ntenants='acme'\nroles=[]", "token[0].tenants"),
        (f"[[token]]\nsha256='{'0' * 64}'\nsubject='user:a'\ntenants=[]\nroles=['root']", "token[0].roles"),
        (
            f"[[token]]\nsha256='{'0' * 64}'\nsubject='user:a'\ntenants=[]\nroles=[]\nexpires=2026-01-01T00:00:00",
            "token[0].expires",
        ),
        ("[[token]]\npassword='secret'", "tokens"),
        ("token = ", "tokens"),
    ],
)
def test_a_wrong_file_is_told_by_its_field(tmp_path: Path, clock: Clock, text: str, field: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(InvalidField) as wrong:
        TokenFile(tmp_path / "t.toml", clock=clock)
    assert wrong.value.field == field
    assert "secret" not in str(wrong.value)


@given(st.text(min_size=1, max_size=40), st.lists(st.text(max_size=20), max_size=4))
def test_whoever_is_added_is_found_as_they_were_named(id: str, tenants: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.toml"
        made = token(path, f"user:{id}", tenants, ["reader"])
        again = token(path, "user:other", ["acme"], ["reader"])
        file = TokenFile(path, clock=Clock())
        assert file.principal(made) == Principal("user", id, frozenset(tenants), ("reader",), "token-file")
        assert file.principal(again) is not None


def test_a_role_gives_its_rights_and_no_more(server: Server) -> None:
    held = server.held["acme"]
    for role, rights in ROLES.items():
        bearer = token(server.tokens, f"user:{role}", ["acme"], [role])
        client = server.client(bearer)
        assert set(client.get("/api/me").json()["rights"]) == rights
        said = {
            what: client.post(f"/api/envelopes/{held}/{what}", json={"reason": "r"}) for what in ("approve", "deny")
        }
        if "approve" not in rights:
            assert {answer.status_code for answer in said.values()} == {403}
    assert server.controller.ledger.read(held).record().state in ("held", "denied")  # type: ignore[union-attr]


# Decisions, and others' tenants


def test_an_approval_is_a_request_of_who_signed_in(server: Server) -> None:
    held = server.held["acme"]
    answer = server.client(server.dana).post(f"/api/envelopes/{held}/approve", json={"reason": "fine"})
    assert (answer.status_code, answer.json()) == (200, {"id": held, "state": "held"})
    record = server.controller.ledger.read(held).record()  # type: ignore[union-attr]
    said = record.approval.data
    assert (said.approver, said.reason) == ("user:dana", "fine")
    admitted = server.controller.ledger.read(said.admission).record().envelope  # type: ignore[union-attr]
    assert (admitted.identity.tenant, admitted.identity.authentication.method) == ("acme", "token-file")


def test_the_policy_decides_whatever_the_role(server: Server) -> None:
    bearer = token(server.tokens, "user:kim", ["acme"], ["approver"])
    answer = server.client(bearer).post(f"/api/envelopes/{server.held['acme']}/approve", json={"reason": "fine"})
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:execution-envelope:problem:denied")


def test_another_tenants_envelope_cannot_be_told_from_none(server: Server) -> None:
    client, theirs = server.client(server.dana), server.held["globex"]
    absent = "01a21cdd-e4d5-7147-9339-d0ad6f4de52b"
    for method, path in (("GET", ""), ("GET", "/tree"), ("POST", "/approve"), ("POST", "/deny"), ("POST", "/revoke")):
        body = {"json": {"reason": "r"}} if method == "POST" else {}
        one = client.request(method, f"/api/envelopes/{theirs}{path}", **body)
        none = client.request(method, f"/api/envelopes/{absent}{path}", **body)
        assert one.status_code == none.status_code == 404
        assert one.text.replace(theirs, absent) == none.text
        assert "globex" not in one.text


# Signing in


def signed_in(server: Server, bearer: str) -> TestClient:
    client = server.client(follow_redirects=False)
    assert client.post("/signin", data={"token": bearer}).status_code == 303
    return client


def csrf(server: Server, client: TestClient) -> str:
    session = server.app.state.console.sessions.find(client.cookies[COOKIE])
    assert session is not None
    return str(session.csrf)


def test_signing_in_sets_a_cookie_that_scripts_and_other_sites_do_not_get(server: Server) -> None:
    answer = server.client(follow_redirects=False).post("/signin", data={"token": server.dana, "to": "/budgets"})
    cookie = answer.headers["set-cookie"]
    assert answer.headers["location"] == "/budgets"
    assert server.dana not in cookie
    assert re.search(r"httponly", cookie, re.I) and re.search(r"samesite=strict", cookie, re.I)
    https = server.client(base_url="https://testserver", follow_redirects=False).post(
        "/signin", data={"token": server.dana}
    )
    assert re.search(r"; *secure", https.headers["set-cookie"], re.I)


@pytest.mark.parametrize(
    "said",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},  # a frame that is shut in
        {"origin": "http://testserver:81"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://testserver"},
    ],
)
def test_no_other_site_signs_anybody_in_or_out(server: Server, said: dict[str, str]) -> None:
    client = signed_in(server, server.dana)
    form = {"token": server.dana, "csrf": csrf(server, client)}
    assert client.post("/signin", data=form, headers=said).status_code == 403
    assert client.post("/signout", data=form, headers=said).status_code == 403
    own = {"sec-fetch-site": "same-origin", "origin": "null"}  # as where a proxy has a name of its own
    assert client.post("/signout", data=form, headers=own, follow_redirects=False).status_code == 303


def test_signing_in_again_ends_the_session_before(server: Server) -> None:
    client = signed_in(server, server.dana)
    before = client.cookies[COOKIE]
    client.post("/signin", data={"token": server.dana})
    assert client.cookies[COOKIE] != before
    assert server.client().get("/api/me", headers={"cookie": f"{COOKIE}={before}"}).status_code == 401


def test_behind_a_proxy_the_cookie_is_for_https_whatever_it_says(server: Server) -> None:
    server.app.add_middleware(OverHttps)
    answer = server.client(follow_redirects=False).post(
        "/signin", data={"token": server.dana}, headers={"x-forwarded-proto": "http"}
    )
    assert re.search(r"; *secure", answer.headers["set-cookie"], re.I)


def test_a_long_address_comes_back_whole(server: Server) -> None:
    to = f"/envelopes?q={'x' * 1500}"
    page = server.client().get("/signin", params={"to": to})
    assert f'value="{to}"' in page.text
    listed = server.client(server.dana).get("/envelopes", params={"q": "x" * 1500, "target": "y" * 200})
    assert f'value="{"x" * 1500}"' in listed.text and f'value="{"y" * 200}"' in listed.text


def test_no_address_makes_a_command_that_does_something_else(server: Server) -> None:
    evil = "--ledger=https://evil.example"
    page = server.client(server.dana).get("/budgets", params={"account": evil}).text
    assert f"<code>envelope budgets -- {evil}</code>" in page


@pytest.mark.parametrize(
    "to", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/\nx", "\\\\x"]
)
def test_signing_in_leads_nowhere_else(server: Server, to: str) -> None:
    answer = server.client(follow_redirects=False).post("/signin", data={"token": server.dana, "to": to})
    assert answer.headers["location"] == "/"


def test_a_signed_in_browser_reads_and_changes_nothing_without_its_form(server: Server) -> None:
    client, path = signed_in(server, server.dana), f"/api/envelopes/{server.held['acme']}/approve"
    assert client.get("/api/me").status_code == 200
    assert client.post(path, json={"reason": "r"}).status_code == 403
    assert client.post(path, json={"reason": "r"}, headers={"x-csrf-token": "guess"}).status_code == 403
    other = signed_in(server, server.dana)
    assert client.post(path, json={"reason": "r"}, headers={"x-csrf-token": csrf(server, other)}).status_code == 403
    mine = {"x-csrf-token": csrf(server, client)}
    assert client.post(path, json={"reason": "r"}, headers=mine | {"origin": "https://evil.example"}).status_code == 403
    assert client.post(path, json={"reason": "r"}, headers=mine | {"origin": "http://testserver"}).status_code == 200


def test_signing_out_ends_it(server: Server) -> None:
    client = signed_in(server, server.dana)
    kept = client.cookies[COOKIE]
    assert client.post("/signout").status_code == 403
    assert client.post("/signout", data={"csrf": csrf(server, client)}).status_code == 303
    assert server.client().get("/api/me", headers={"cookie": f"{COOKIE}={kept}"}).status_code == 401


def test_a_session_ends_with_its_token_and_with_time(server: Server, clock: Clock) -> None:
    short = token(server.tokens, expires=NOW + timedelta(minutes=5))
    client, other = signed_in(server, short), signed_in(server, server.dana)
    clock.now += timedelta(minutes=6)
    assert (client.get("/api/me").status_code, other.get("/api/me").status_code) == (401, 200)
    clock.now += IDLE + timedelta(seconds=1)
    assert other.get("/api/me").status_code == 401


def test_sessions_are_bounded(clock: Clock) -> None:
    sessions = Sessions(clock)
    first = sessions.begin("t")
    assert sessions.find(first) is not None
    for _ in range(2 * MAX_OF_ONE):  # one who signs in again and again drives out nobody
        of_one = [sessions.begin("busy") for _ in range(MAX_OF_ONE)]
    assert sessions.find(first) is not None and all(map(sessions.find, of_one))
    for number in range(MAX_SESSIONS):
        last = sessions.begin(f"t{number}")
    assert sessions.find(first) is None
    for _ in range(int(LONGEST / IDLE) + 1):
        clock.now += IDLE
        sessions.find(last)
    assert sessions.find(last) is None  # however busy


# What every answer says, and how much may be asked


def test_every_answer_keeps_a_browser_from_mischief(server: Server) -> None:
    client = server.client(server.dana)
    for answer in (
        client.get("/api/me"),
        client.get("/nowhere"),
        server.client().get("/api/me"),
        client.get("/signin"),
    ):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"


def test_what_nobody_foresaw_is_answered_as_safely(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("/srv/secret")

    monkeypatch.setattr(server.app.state.console.review, "lag", fails)
    client = server.client(server.dana, raise_server_exceptions=False)
    for path, accept in (("/api/health", "*/*"), ("/health", "text/html")):
        answer = client.get(path, headers={"accept": accept})
        assert (answer.status_code, "secret" in answer.text) == (500, False)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_another_method_is_told_which_there_are(server: Server) -> None:
    answer = server.client(server.dana).put("/api/me")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert answer.json()["type"] == "urn:execution-envelope:problem:method-not-allowed"


def test_two_of_one_name_share_no_allowance() -> None:
    limits, dana = RateLimits(requests="1/minute"), Principal("user", "dana", None, ("reader",), "token-file")
    limits.spend(dana)
    limits.spend(replace(dana, method="oidc", issuer="https://a"))
    limits.spend(replace(dana, method="oidc", issuer="https://b"))
    with pytest.raises(HTTPException):
        limits.spend(dana)


def test_guessing_is_slowed_down_and_others_are_not(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, clock, limits=RateLimits(requests="5/minute", failures="3/minute"))
    guesser = server.client(client=("192.0.2.1", 1))
    found = [guesser.get("/api/me", headers={"authorization": f"Bearer {n}"}).status_code for n in range(5)]
    assert found == [401, 401, 401, 429, 429]
    late = guesser.post("/signin", data={"token": "x"})
    assert (late.status_code, int(late.headers["retry-after"]) > 0) == (429, True)
    # Many may be behind one address: whoever is known is served, and is not asked to wait for the one who guesses.
    right = token(server.tokens, "user:other")
    assert guesser.get("/api/me", headers={"authorization": f"Bearer {right}"}).status_code == 200
    asked = [server.client(server.dana).get("/api/me").status_code for _ in range(6)]
    assert asked == [200] * 5 + [429]
    anyio.run(server.controller.aclose)


def test_a_body_is_bounded_by_its_length_and_by_what_comes(server: Server) -> None:
    client, path = server.client(server.dana), f"/api/envelopes/{server.held['acme']}/approve"
    kind = {"content-type": "application/json"}
    assert client.post(path, content=b"x" * (MAX_BODY + 1), headers=kind).status_code == 413
    assert (
        client.post(path, content=(b"x" * 65536 for _ in range(MAX_BODY // 65536 + 2)), headers=kind).status_code == 413
    )
    for content, status in (
        (b"{", 400),
        (b"[" * 100_000, 422),
        (b'{"reason": 1}', 422),
        (b'{"reason": ""}', 422),
        (b"\xff", 400),
    ):
        assert client.post(path, content=content, headers=kind).status_code == status
    assert client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


# OpenID Connect


@pytest.fixture(scope="module")
def provider() -> Iterator[str]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oidc_provider_mock

        with oidc_provider_mock.run_server_in_thread() as server:
            yield f"http://localhost:{server.server_port}"


def signed(provider: str, claims: dict[str, Any], audience: str = "console") -> str:
    """A token as the provider signs it, by the code flow."""
    assert httpx.put(f"{provider}/users/dana", json=claims).is_success
    where = f"{provider}/oauth2/authorize"
    asked = {"client_id": audience, "redirect_uri": "http://app/cb", "response_type": "code", "scope": "openid"}
    answer = httpx.post(where, params=asked, data={"sub": "dana"})
    code = parse_qs(urlsplit(answer.headers["location"]).query)["code"][0]
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": "http://app/cb"}
    found = httpx.post(f"{provider}/oauth2/token", data=form, auth=(audience, "secret")).json()
    return str(found["id_token"])


def test_an_issuer_says_who_somebody_is(provider: str) -> None:
    issuer = OidcIssuer(provider, audience="console")
    who = issuer.principal(signed(provider, {"tenants": ["acme"], "roles": ["operator", "janitor"]}))
    assert who == Principal("user", "dana", frozenset({"acme"}), ("operator",), "oidc", provider)
    everybody = issuer.principal(signed(provider, {"tenants": ["*"], "roles": "auditor"}))
    assert everybody is not None and everybody.tenants is None
    service = issuer.principal(signed(provider, {"tenants": "acme", "roles": ["service"]}))
    assert service is not None and (service.type, service.tenants) == ("service", frozenset({"acme"}))


def test_a_token_without_our_roles_or_for_others_is_of_nobody(provider: str) -> None:
    issuer = OidcIssuer(provider, audience="console")
    assert issuer.principal(signed(provider, {"tenants": ["acme"]})) is None
    assert issuer.principal(signed(provider, {"tenants": ["acme"], "roles": ["janitor"]})) is None
    assert issuer.principal(signed(provider, {"tenants": ["acme"], "roles": ["reader"]}, audience="other")) is None
    assert OidcIssuer(f"{provider}/", audience="console").principal(signed(provider, {"roles": ["reader"]})) is None


def hmac_signed(claims: dict[str, Any], named: dict[str, Any], secret: str) -> str:
    """As an attacker would, whose library refuses nothing."""
    parts = [{"alg": "HS256", "typ": "JWT", **named}, claims]
    said = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    made = hmac.new(secret.encode(), said, hashlib.sha256).digest()
    return b".".join((said, base64.urlsafe_b64encode(made).rstrip(b"="))).decode()


def test_a_forged_token_is_of_nobody(provider: str) -> None:
    issuer = OidcIssuer(provider, audience="console")
    good = signed(provider, {"tenants": ["acme"], "roles": ["reader"]})
    head, claims, signature = good.split(".")
    told = json.loads(base64.urlsafe_b64decode(claims + "=="))
    more = base64.urlsafe_b64encode(json.dumps(told | {"tenants": ["*"]}).encode()).rstrip(b"=").decode()
    kid = jwt.get_unverified_header(good).get("kid")
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    named = {} if kid is None else {"kid": kid}
    keys = httpx.get(httpx.get(f"{provider}/.well-known/openid-configuration").json()["jwks_uri"]).text
    forged = {
        "changed": f"{head}.{more}.{signature}",
        "unsigned": jwt.encode(told, None, algorithm="none", headers=named),
        "another key": jwt.encode(told, own, algorithm="RS256", headers=named),
        "the public key as a secret": hmac_signed(told, named, keys),
        "an unknown key": jwt.encode(told, own, algorithm="RS256", headers={"kid": "x"}),
        "not one": "a.b.c",
        "too long": "a." + "b" * 20_000 + ".c",
    }
    assert issuer.principal(good) is not None
    for what, one in forged.items():
        assert issuer.principal(one) is None, what


class Issuer:
    """Answers what it is told to, and counts how often it is asked. `answer` may wait."""

    def __init__(self) -> None:
        owner = self
        self.asked: list[str] = []
        self.keys: Callable[[], bytes] = lambda: b'{"keys": []}'
        self.discovery: dict[str, Any] = {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                owner.asked.append(self.path)
                known = self.path.endswith("/openid-configuration")
                body = json.dumps(owner.discovery).encode() if known else owner.keys()
                if body.startswith(b"to "):
                    self.send_response(302)
                    self.send_header("location", body[3:].decode())
                    self.end_headers()
                elif body == b"garbage":
                    self.wfile.write(b"this is no HTTP\r\n\r\n")
                else:
                    self.send_response(200)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.discovery = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def away() -> Iterator[Issuer]:
    found = Issuer()
    yield found
    found.server.shutdown()
    found.server.server_close()


def named(kid: str) -> str:
    return jwt.encode({"sub": "x"}, "s" * 32, algorithm="HS256", headers={"kid": kid})


KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def keys_of(*kids: str) -> bytes:
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key()))
    return json.dumps({"keys": [{**public, "kid": kid, "use": "sig"} for kid in kids]}).encode()


def own_token(issuer: Issuer, kid: str, **claims: Any) -> str:
    now = datetime.now(UTC)
    said = {"iss": issuer.url, "aud": "console", "sub": "dana", "roles": ["reader"], "tenants": ["acme"], "iat": now}
    said |= {"exp": now + timedelta(minutes=5)} | claims
    return jwt.encode({k: v for k, v in said.items() if v is not None}, KEY, algorithm="RS256", headers={"kid": kid})


def test_an_issuer_is_not_asked_for_every_token_that_comes(away: Issuer) -> None:
    now = [0.0]
    issuer = OidcIssuer(away.url, audience="console", clock=lambda: now[0])
    away.keys = lambda: keys_of("one")
    assert issuer.principal(own_token(away, "one")) is not None
    for number in range(50):
        assert issuer.principal(named(f"made up {number}")) is None
    assert len(away.asked) == 2
    # Keys that are changed are found soon, and what the issuer had last counts for a while where it is away.
    away.keys = lambda: keys_of("two")
    assert issuer.principal(own_token(away, "two")) is None
    now[0] += RETRY
    assert issuer.principal(own_token(away, "two")) is not None
    assert issuer.principal(own_token(away, "one")) is None
    away.keys = lambda: b"garbage"
    now[0] += FRESH
    assert issuer.principal(own_token(away, "two")) is not None
    now[0] += LASTS
    assert issuer.principal(own_token(away, "two")) is None


def test_an_issuer_that_does_not_answer_holds_up_one_and_not_one_after_another(away: Issuer) -> None:
    now, may = [0.0], threading.Event()
    issuer = OidcIssuer(away.url, audience="console", clock=lambda: now[0])

    def late() -> bytes:
        may.wait(20)
        return b"garbage"

    away.keys = late
    threads = [threading.Thread(target=issuer.principal, args=(named("a"),)) for _ in range(12)]
    for thread in threads:
        thread.start()
    may.set()
    for thread in threads:
        thread.join(20)
    assert len(away.asked) == 2 and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    "answer",
    [b"garbage", b"[" * 100_000, b"{}", b'{"keys": 1}', b'{"keys": [1]}', b"null", b"x" * 1_000_001, b"\xff", b"to /"],
)
def test_an_issuer_that_answers_nonsense_lets_nobody_in(away: Issuer, answer: bytes) -> None:
    away.keys = lambda: answer
    assert OidcIssuer(away.url, audience="console").principal(own_token(away, "one")) is None


def test_keys_are_taken_from_nowhere_else(away: Issuer) -> None:
    other = Issuer()
    other.keys = lambda: keys_of("one")
    away.keys = lambda: f"to {other.url}/keys".encode()
    assert OidcIssuer(away.url, audience="console").principal(own_token(away, "one")) is None
    away.keys, away.discovery["jwks_uri"] = (lambda: keys_of("one")), "http://issuer.example/keys"
    assert OidcIssuer(away.url, audience="console").principal(own_token(away, "one")) is None
    assert other.asked == []
    other.server.shutdown()
    other.server.server_close()


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": None},
        {"iat": None},
        {"sub": None},
        {"sub": 7},
        {"aud": "other"},
        {"iss": "x"},
        {"exp": 1},
        {"nbf": 2**40},
    ],
)
def test_a_claim_that_is_missing_or_wrong_makes_it_nobodys(away: Issuer, claims: dict[str, Any]) -> None:
    away.keys = lambda: keys_of("one")
    issuer = OidcIssuer(away.url, audience="console")
    assert issuer.principal(own_token(away, "one")) is not None
    assert issuer.principal(own_token(away, "one", **claims)) is None


def test_an_issuer_that_is_away_lets_nobody_in() -> None:
    assert OidcIssuer("http://127.0.0.1:1", audience="console").principal("a.b.c") is None


@pytest.mark.parametrize("url", ["http://issuer.example", "ftp://issuer.example", "file:///etc", "issuer"])
def test_an_issuer_is_asked_over_https(url: str) -> None:
    with pytest.raises(InvalidField) as wrong:
        OidcIssuer(url, audience="console")
    assert wrong.value.field == "oidc.issuer"


def test_what_a_principal_may_does_not_depend_on_the_order_of_roles() -> None:
    one = Principal("user", "a", None, ("reader", "auditor"), "token-file")
    assert one.rights == replace(one, roles=("auditor", "reader")).rights == {"read", "audit"}

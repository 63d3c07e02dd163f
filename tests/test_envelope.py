"""The sealed part: canonical, immutable, bounded, and the same request recognised as the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import timedelta, timezone
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given

from execution_envelope import Ask, InvalidField, Subject, credentials, established, per_replica, total
from execution_envelope.envelope import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_REDACTED,
    MAX_VALUE_BYTES,
    Scoped,
    SealedEnvelope,
    canonical,
    decode,
    seal,
    sha256,
    timestamp,
)
from execution_envelope.errors import Unidentified
from execution_envelope.resources import VOCABULARY
from execution_envelope.testing import START, ask
from tests.strategies import asks

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
SURROGATE = "a\ud800"


def sealed(**overrides: Any) -> SealedEnvelope:
    return seal(ask(**overrides), id=ID, now=START)


def plain(**overrides: Any) -> Any:
    return json.loads(sealed(**overrides).body)


def test_the_five_families() -> None:
    body = plain(
        subject=Subject(
            "agent",
            "planner",
            tenant="acme",
            roles=["operator", "reader"],
            delegation=[("user", "dana"), ("service", "gateway")],
            method="oidc",
            issuer="https://login.example",
            session="txn-7",
        ),
        scope={
            "project": established("research", by="token"),
            "regions": ["eu"],
            "priority": 3,
            "hints": {"pii": "no"},
        },
        requested={"gpu": 2, "memory": {"amount": "1GiB", "floor": "512MiB", "per": "replica"}},
        constraints={"engine": "vllm"},
        schema="DeployModelRequest",
        body={"model": "m"},
        request_id="req-1",
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        tracestate="v=1",
        idempotency_key="key-1",
        part_of="p",
        runs_on="r",
        supersedes="s",
        facets={"kamiwaza.deploy": ("gateway", "https://example/schema", {"n": 1.5})},
    )
    assert body == {
        "identity": {
            "subject": {"type": "agent", "id": "planner"},
            "tenant": "acme",
            "roles": ["operator", "reader"],
            "delegation": [{"type": "user", "id": "dana"}, {"type": "service", "id": "gateway"}],
            "authentication": {"method": "oidc", "issuer": "https://login.example", "session": "txn-7"},
        },
        "execution": {
            "kind": "model.deploy",
            "operation": "serving.deploy_model",
            "target": {"type": "model", "id": "smollm2-135m", "version": "q4"},
            "entrypoint": "POST /serving/deploy_model",
            "request": {"schema": "DeployModelRequest", "sha256": sha256(b'{"model":"m"}')},
        },
        "scope": {
            "project": {"value": "research", "provenance": "established", "by": "token"},
            "regions": {"value": ["eu"]},
            "priority": {"value": 3},
            "hints": {"pii": {"value": "no"}},
        },
        "requested": {
            "resources": {
                "gpu": {"amount": 2000},
                "memory": {"amount": 2**30, "floor": 2**29, "per": "replica"},
            },
            "constraints": {"engine": {"value": "vllm"}},
        },
        "correlation": {
            "id": ID,
            "schema_version": "1",
            "created_at": "2026-05-01T12:00:00.000000Z",
            "request_id": "req-1",
            "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
            "tracestate": "v=1",
            "idempotency_key": "key-1",
            "part_of": "p",
            "runs_on": "r",
            "supersedes": "s",
            "facets": {
                "kamiwaza.deploy": {
                    "producer": "gateway",
                    "schema": "https://example/schema",
                    "text": '{"n":1.5}',
                    "sha256": sha256(b'{"n":1.5}'),
                }
            },
        },
    }


@given(asks())
def test_the_canonical_form_is_rfc_8785_and_comes_back_byte_for_byte(random: Ask) -> None:
    result = seal(random, id=ID, now=START)
    assert result.body == rfc8785.dumps(json.loads(result.body))
    assert result.digest == sha256(result.body)
    again = decode(result.body)
    assert again == result.envelope
    assert msgspec.json.encode(again, order="sorted") == result.body
    # Sealing is a function: the same ask, the same bytes.
    assert seal(random, id=ID, now=START) == result


@given(asks())
def test_nothing_that_was_asked_is_unbounded(random: Ask) -> None:
    for text in strings(json.loads(seal(random, id=ID, now=START).body)):
        assert len(text) <= MAX_VALUE_BYTES + 200


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in strings(item)]


@given(asks())
def test_every_nested_thing_refuses_change(random: Ask) -> None:
    result = seal(random, id=ID, now=START)
    for envelope in (result.envelope, decode(result.body)):
        assert frozen(envelope) > 5


def frozen(value: Any) -> int:
    """How many values there are at and below `value`, after failing to change each."""
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            with pytest.raises(AttributeError):
                setattr(value, name, None)
        return 1 + sum(frozen(getattr(value, name)) for name in value.__struct_fields__)
    if isinstance(value, Mapping):
        changes = [
            lambda: value.update(x=1),
            lambda: value.__setitem__("x", 1),
            lambda: value.setdefault("x", 1),
            lambda: value.clear(),
            lambda: value.popitem(),
            lambda: value.pop("x"),
            lambda: value.__delitem__("x"),
            lambda: value.__ior__({"x": 1}),
        ]
        for change in changes:
            with pytest.raises(TypeError):
                change()
        return 1 + sum(frozen(item) for item in value.values())
    if isinstance(value, tuple):
        return 1 + sum(frozen(item) for item in value)
    assert value is None or isinstance(value, str | int)
    return 1


TOO_MANY = {
    "roles": {"subject": Subject("user", "d", roles=["r"] * 65)},
    "delegation": {"subject": Subject("user", "d", delegation=[("user", "u")] * 17)},
    "scope.hints": {"scope": {"hints": {f"h{n}": "x" for n in range(33)}}},
    "scope.regions": {"scope": {"regions": ["eu"] * 33}},
    "requested": {"requested": {f"r{n}": 1 for n in range(33)}},
    "constraints": {"constraints": {f"c{n}": 1 for n in range(65)}},
    "facets": {"facets": {f"f{n}": ("p", None, 1) for n in range(17)}},
}


@pytest.mark.parametrize("name", MAX_ENTRIES)
def test_too_many_entries_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidField, match=f"expected at most {MAX_ENTRIES[name]} entries") as refused:
        sealed(**TOO_MANY[name])
    assert refused.value.field.removeprefix("identity.") == name


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"secrets": "env.*"}, "secrets"),
    ({"secrets": [5]}, "secrets"),
    ({"subject": Subject("user", "d", roles="operator")}, "identity.roles"),
    ({"subject": Subject("user", "d", roles=5)}, "identity.roles"),  # type: ignore[arg-type]
    ({"subject": Subject("user", "d", delegation="user")}, "identity.delegation"),  # type: ignore[arg-type]
    ({"subject": Subject("user", "d", delegation=["ab"])}, "identity.delegation"),  # type: ignore[list-item]
    ({"subject": Subject("user", "d", delegation=[("a", "b", "c")])}, "identity.delegation"),  # type: ignore[list-item]
    ({"subject": "dana"}, "identity.subject"),
    ({"target": None}, "execution.target"),
    ({"target": "m"}, "execution.target"),
    ({"kind": ["model.deploy"]}, "execution.kind"),
    ({"scope": "prod"}, "scope"),
    ({"scope": {5: "x"}}, "scope.5"),
    ({"scope": {"regions": "eu"}}, "scope.regions"),
    ({"scope": {"regions": established("eu", by="token")}}, "scope.regions"),
    ({"scope": {"project": established(1.5, by="token")}}, "scope.project"),  # type: ignore[arg-type]
    ({"scope": {"hints": "x"}}, "scope.hints"),
    ({"requested": "gpu"}, "requested"),
    ({"requested": {5: 1}}, "requested.5"),
    ({"client_defaults": "gpu"}, "client_defaults"),
    ({"constraints": ["engine"]}, "constraints"),
    ({"facets": {"a.b": {}}}, "facets.a.b"),
    ({"facets": {"a.b": ("p", None)}}, "facets.a.b"),
    ({"facets": {"a.b": {}}, "secrets": ["facets.a.b"]}, "facets.a.b"),
    ({"supersedes": 5}, "correlation.supersedes"),
    ({"part_of": 5}, "correlation.part_of"),
    ({"traceparent": 5}, "correlation.traceparent"),
    ({"idempotency_key": ""}, "correlation.idempotency_key"),
    ({"idempotency_key": 7}, "correlation.idempotency_key"),
    ({"requested": {"gpu": {"amount": 1, "floor": 2}}}, "requested.gpu.floor"),
    ({"requested": {"gpu": {"amount": 2, "ceiling": 1}}}, "requested.gpu.ceiling"),
]


@pytest.mark.parametrize(("overrides", "field"), WRONG, ids=[f"{field}-{n}" for n, (_, field) in enumerate(WRONG)])
def test_a_wrong_type_is_refused_by_name(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        sealed(**overrides)
    assert refused.value.field == field


def test_a_list_of_regions_may_be_established() -> None:
    assert plain(scope={"regions": established(["eu", "us"], by="token")})["scope"]["regions"]["value"] == ["eu", "us"]
    assert plain(scope={"regions": Scoped(["eu"])})["scope"]["regions"]["value"] == ["eu"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"kind": "model.delete"}, "execution.kind"),
        ({"operation": 7}, "execution.operation"),
        ({"scope": {"team": "x"}}, "scope.team"),
        ({"scope": {"project": True}}, "scope.project"),
        ({"scope": {"project": 1.5}}, "scope.project"),
        ({"scope": {"project": {"a": 1}}}, "scope.project"),
        ({"scope": {"regions": [1]}}, "scope.regions"),
        ({"scope": {"hints": {"a b": "x"}}}, "scope.hints"),
        ({"requested": {"gpus": 1}}, "requested.gpus"),
        ({"requested": {"gpu": "1GiB"}}, "requested.gpu"),
        ({"requested": {"memory": {"amount": 1, "floor": "x"}}}, "requested.memory.floor"),
        ({"constraints": {"a b": 1}}, "constraints"),
        ({"constraints": {"é": 1}}, "constraints"),
        ({"constraints": {"a": object()}}, "constraints.a"),
        ({"constraints": {"a": {"b": b"x"}}}, "constraints.a.b"),
        ({"constraints": {"a": {"b c": 1}}}, "constraints.a"),
        ({"client_defaults": {"gpu": "x"}}, "client_defaults.gpu"),
        ({"schema": "s", "body": {"x": object()}}, "execution.request"),
        ({"facets": {"a": ("p", None, object())}}, "facets.a"),
        ({"facets": {"a b": ("p", None, 1)}}, "facets"),
        ({"subject": Subject("user", 7)}, "identity.subject.id"),  # type: ignore[arg-type]
        ({"idempotency_key": b"k"}, "correlation.idempotency_key"),
    ],
)
def test_what_cannot_be_sealed_is_refused_by_name(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        sealed(**overrides)
    assert refused.value.field == field


def nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = {"k": value}
    return value


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"operation": SURROGATE}, "execution.operation"),
        ({"subject": Subject("user", SURROGATE)}, "identity.subject.id"),
        ({"subject": Subject("user", "d", tenant=SURROGATE)}, "identity.tenant"),
        ({"subject": Subject("user", "d", roles=[SURROGATE])}, "identity.roles"),
        ({"scope": {"project": SURROGATE}}, "scope.project"),
        ({"constraints": {"a": [SURROGATE]}}, "constraints.a"),
        ({"constraints": {"a": nested(MAX_DEPTH + 2, SURROGATE)}}, "constraints.a" + ".k" * MAX_DEPTH),
        ({"constraints": {SURROGATE: 1}}, "constraints"),
        ({"schema": "s", "body": {"x": SURROGATE}}, "execution.request"),
        ({"schema": "s", "body": {SURROGATE: 1}}, "execution.request"),
        ({"facets": {"a": ("p", None, SURROGATE)}}, "facets.a"),
        ({"request_id": SURROGATE}, "correlation.request_id"),
        ({"idempotency_key": SURROGATE}, "correlation.idempotency_key"),
    ],
)
def test_lone_surrogates_are_refused_by_name(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        sealed(**overrides)
    assert refused.value.field == field


def test_nobody_is_refused() -> None:
    with pytest.raises(Unidentified, match="expected a subject"):
        sealed(subject=None)


def test_long_text_is_cut_and_says_so() -> None:
    whole = "é" * 5000
    text = plain(entrypoint=whole)["execution"]["entrypoint"]
    assert text == "é" * 1024 + f"... [cut: 5000 characters, sha256 {sha256(whole.encode())}]"


def test_a_long_key_is_cut_but_its_digest_is_of_the_whole() -> None:
    keys = ["k" * 300 + end for end in "ab"]
    first, second = (sealed(idempotency_key=key) for key in keys)
    assert first.key_digest != second.key_digest
    assert len(first.envelope.correlation.idempotency_key or "") < 400


def test_a_large_value_is_cut_and_says_so() -> None:
    value = ["x" * 1000] * 5
    encoded = rfc8785.dumps(value)
    cut = {"bytes": len(encoded), "sha256": sha256(encoded)}
    assert plain(constraints={"a": value})["requested"]["constraints"]["a"]["value"] == {"cut": cut}


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 100])
def test_a_deep_value_is_cut_and_says_so(depth: int) -> None:
    value = plain(constraints={"a": nested(depth, 1)})["requested"]["constraints"]["a"]["value"]
    rest = rfc8785.dumps(nested(depth - MAX_DEPTH, 1))
    expected = {"cut": {"bytes": len(rest), "sha256": sha256(rest)}} if depth > MAX_DEPTH else 1
    assert value == nested(MAX_DEPTH, expected)


def test_data_deeper_than_anything_readable_is_refused_by_name() -> None:
    deep = nested(100_000, 1)
    for overrides, field in (
        ({"constraints": {"a": deep}}, "constraints.a" + ".k" * MAX_DEPTH),
        ({"facets": {"a": ("p", None, deep)}}, "facets.a"),
        ({"schema": "s", "body": deep}, "execution.request"),
    ):
        with pytest.raises(InvalidField) as refused:
            sealed(**overrides)
        assert refused.value.field == field


def test_numbers_that_json_would_change_become_text() -> None:
    constraints = plain(constraints={"f": 0.1, "i": 2**53, "n": -(2**53), "ok": 2**53 - 1})["requested"]["constraints"]
    assert {name: item["value"] for name, item in constraints.items()} == {
        "f": "0.1",
        "i": "9007199254740992",
        "n": "-9007199254740992",
        "ok": 2**53 - 1,
    }


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(("entrypoint", "schema", "request_id", "idempotency_key", "part_of"))
    with_null = sealed(
        scope={"project": None, "hints": {"h": None}},
        requested=dict.fromkeys(VOCABULARY),
        constraints={"a": None},
        **nulls,
    )
    assert with_null.body == sealed(scope={"hints": {}}, requested={}, constraints={}, entrypoint=None).body
    assert b"null" not in with_null.body
    assert with_null.key_digest is None


def test_zero_and_false_and_empty_are_not_absent() -> None:
    body = plain(requested={"gpu": 0}, constraints={"a": False, "b": "", "c": [], "d": 0}, scope={"project": ""})
    assert body["requested"]["resources"] == {"gpu": {"amount": 0}}
    assert {k: v["value"] for k, v in body["requested"]["constraints"].items()} == {
        "a": False,
        "b": "",
        "c": [],
        "d": 0,
    }
    assert body["scope"] == {"project": {"value": ""}, "hints": {}}


CLIENT_DEFAULT = """
constraints  a  false      false      client_default
constraints  a  false      0          asserted
constraints  a  0          0          client_default
constraints  a  0          false      asserted
constraints  a  [0]        [false]    asserted
constraints  a  {"x":1}    {"x":true} asserted
constraints  a  {"x":[1]}  {"x":[1]}  client_default
constraints  a  "1"        1          asserted
constraints  a  1.5        1.5        client_default
constraints  a  "x"        "y"        asserted
requested    replicas 1    1          client_default
requested    replicas 1    2          asserted
requested    memory   "1KiB" 1024     client_default
requested    gpu  {"amount":1,"per":"replica"} 1 asserted
requested    memory   0    0          client_default
"""


@pytest.mark.parametrize("row", CLIENT_DEFAULT.strip().splitlines())
def test_what_a_client_always_sends(row: str) -> None:
    family, name, sent, default, expected = row.split()
    body = plain(**{family: {name: json.loads(sent)}}, client_defaults={name: json.loads(default)})
    entry = body["requested"]["resources" if family == "requested" else "constraints"][name]
    assert entry.get("provenance", "asserted") == expected


def test_a_client_default_that_was_not_sent_is_absent() -> None:
    assert plain(requested={}, client_defaults={"gpu": 1})["requested"]["resources"] == {}


def test_asserted_and_established() -> None:
    scope = plain(
        scope={
            "project": "p",
            "environment": established("prod", by="server"),
            "regions": established(["eu"], by="policy"),
        }
    )["scope"]
    assert scope == {
        "project": {"value": "p"},
        "environment": {"value": "prod", "provenance": "established", "by": "server"},
        "regions": {"value": ["eu"], "provenance": "established", "by": "policy"},
        "hints": {},
    }


@pytest.mark.parametrize(
    "text", ["", "nonsense", "00-" + "0" * 32 + "-" + "b" * 16 + "-01", "00-" + "a" * 32 + "-" + "0" * 16 + "-01"]
)
def test_an_unusable_trace_context_is_left_out(text: str) -> None:
    correlation = plain(traceparent=text, tracestate="v=1")["correlation"]
    assert not {"traceparent", "tracestate"} & correlation.keys()


def request(**overrides: Any) -> SealedEnvelope:
    return sealed(**{"schema": "S", "body": {"model": "m", "env": {"TOKEN": "one"}}, "secrets": ["env.*"]} | overrides)


def test_the_same_request_is_the_same_whatever_its_secrets() -> None:
    other = request(body={"env": {"TOKEN": "two"}, "model": "m"})
    assert other.request_digest == request().request_digest
    assert other.redacted == request().redacted == ("request.env.TOKEN",)


@pytest.mark.parametrize(
    "same",
    [
        {"request_id": "other"},
        {"entrypoint": None, "schema": "S"},
        {"subject": Subject("user", "erin")},
        {"idempotency_key": "k"},
        {"supersedes": "x"},
        {"facets": {"a": ("p", None, 1)}},
    ],
    ids=str,
)
def test_identity_and_correlation_are_no_part_of_what_is_asked(same: dict[str, Any]) -> None:
    base = {"entrypoint": None} if "entrypoint" in same else {}
    assert request(**same).request_digest == request(**base).request_digest


@pytest.mark.parametrize(
    "other",
    [
        {"body": {"model": "n", "env": {"TOKEN": "one"}}},
        {"body": {"model": "m", "env": {"TOKEN": "one", "MORE": "x"}}},
        {"body": {"model": "m"}},
        {"schema": "T"},
        {"operation": "serving.scale"},
        {"kind": "inference"},
        {"scope": {"project": "other"}},
        {"scope": {"project": established("research", by="t"), "environment": "test"}},
        {"requested": {"gpu": 2, "memory": "2GiB"}},
        {"requested": {"gpu": 1}},
        {"constraints": {}},
        {"entrypoint": "GET /"},
    ],
    ids=str,
)
def test_another_request_is_another_one(other: dict[str, Any]) -> None:
    assert request(**other).request_digest != request().request_digest


def test_a_key_is_scoped_by_tenant_subject_and_operation() -> None:
    def key(**overrides: Any) -> str:
        result = sealed(**{"idempotency_key": "k"} | overrides).key_digest
        assert result is not None and re.fullmatch("[0-9a-f]{64}", result)
        return result

    assert key() == key(requested={}, scope={}, subject=Subject("user", "dana", tenant="acme", roles=["other"]))
    others = [
        key(idempotency_key="l"),
        key(operation="other"),
        key(subject=Subject("user", "erin", tenant="acme")),
        key(subject=Subject("service", "dana", tenant="acme")),
        key(subject=Subject("user", "dana", tenant="other")),
        key(subject=Subject("user", "dana")),
    ]
    assert len({key(), *others}) == 7


def test_the_list_of_removed_paths_is_bounded() -> None:
    names = {f"N{n}" + "x" * 2000: "v" for n in range(500)}
    redacted = request(body={"env": names}).redacted
    assert len(redacted) == MAX_REDACTED
    assert redacted[-1] == f"... and {500 - MAX_REDACTED + 1} more"
    assert max(map(len, redacted)) < 700


#: What is asked, and the digests that it had when sealing looked through every text by itself.
GOLDEN: list[tuple[dict[str, Any], str, str]] = [
    ({}, "cda69f69c1e15ebb", "e579b80f8372f03b"),
    (
        {
            "scope": {
                "regions": ["eu"],
                "priority": 3,
                "hints": {"pii": "no", "n": 2**60},
                "project": established("p", by="t"),
            }
        },
        "b2e913c648899e73",
        "0dfd70f6b52d72b8",
    ),
    (
        {"requested": {"gpu": 0.5, "memory": per_replica("1GiB", floor="512MiB"), "replicas": 1, "cost": "unlimited"}},
        "25419c7a5ca173d5",
        "d7285c74d825496c",
    ),
    (
        {"requested": {"replicas": total(1, floor=1)}, "client_defaults": {"replicas": total(1, floor=1)}},
        "77e070a45a7edf32",
        "5b591ba4fb75121f",
    ),
    (
        {"constraints": {"a": [1, {"b": "é"}], "c": 1.5, "d": False, "e": "x" * 2000, "f": {"g": ["y" * 999] * 9}}},
        "f192fbbabe85ffea",
        "ffabca44152b8f1e",
    ),
    (
        {"constraints": {"a": False, "b": 0, "c": "x"}, "client_defaults": {"a": False, "b": False, "c": "x"}},
        "b4d0677dca6e8938",
        "787b7f6d46578160",
    ),
    (
        {"facets": {"ns.name": ("p", None, {"a": [1.5, "\n"]}), "plain": ("p", "https://example/schema", "x")}},
        "a13e08c77c732937",
        "e579b80f8372f03b",
    ),
    (
        {"schema": "S", "body": {"a": None, "b": [1.5, {"c": "\\"}], "env": {"A": "x"}}, "secrets": ["env.*"]},
        "6fd089cb4c8c977c",
        "575101da527dd358",
    ),
    (
        {"schema": "S", "body": {"key": "hf_" + "Ab1" * 12}, "constraints": {"args": ["--key", "hf_" + "Ab1" * 12]}},
        "9928d583e1f6edee",
        "f327b814fa38d82f",
    ),
    (
        {"entrypoint": "C:\\models\t" + "gh" + "p_" + "Ab1" * 13, "idempotency_key": "k" * 300},
        "46c410418f8c1f5f",
        "4fb0c4a1dfd694c9",
    ),
    (
        {
            "subject": Subject(
                "agent", "a", roles=["r"], delegation=[("user", "dana")], method="oidc", issuer="https://i"
            )
        },
        "a67a7d66af0e163c",
        "e579b80f8372f03b",
    ),
    (
        {
            "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
            "tracestate": "v=1",
            "request_id": "é",
            "part_of": "p",
        },
        "9eade361da4db493",
        "e579b80f8372f03b",
    ),
]


@pytest.mark.parametrize(("overrides", "digest", "request_digest"), GOLDEN, ids=range(len(GOLDEN)))
def test_the_sealed_bytes_stay_the_same(overrides: dict[str, Any], digest: str, request_digest: str) -> None:
    result = sealed(**overrides)
    assert (result.digest[:16], result.request_digest[:16]) == (digest, request_digest)


def test_times_are_of_fixed_width() -> None:
    moment = START.replace(microsecond=7)
    east = timezone(timedelta(hours=2))
    assert [timestamp(each) for each in (START, moment, moment.replace(tzinfo=None), moment.replace(tzinfo=east))] == [
        "2026-05-01T12:00:00.000000Z",
        *["2026-05-01T12:00:00.000007Z"] * 3,
    ]


class Odd(dict[str, Any]):
    """A dict that shows something else than it holds, as those of some frameworks do."""

    def items(self) -> Any:
        return [(name, value[0]) for name, value in super().items()]


@pytest.mark.parametrize("body", [Odd(a=[1, 2]), {"a": Odd(b=["x"])}, {"a": (1, "x")}])
def test_a_body_of_other_types_has_the_digest_of_what_is_in_it(body: Any) -> None:
    found = sealed(schema="S", body=body).envelope.execution.request
    plain = credentials.redact(body, path="", found=lambda _: None)
    assert found is not None and found.sha256 == sha256(canonical(plain))

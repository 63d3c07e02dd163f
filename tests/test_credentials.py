"""Not one byte of a credential in a documented format reaches the ledger's files; ordinary text is left alone."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import (
    AdmissionController,
    Ask,
    Candidate,
    Decision,
    Denied,
    Grant,
    Rule,
    Subject,
    Target,
    credentials,
)
from execution_envelope.credentials import (
    FORMATS,
    MAX_TEXT,
    brief,
    clean,
    contains,
    marker,
    redact_text,
    scrub,
    shown,
    suspicious,
)
from execution_envelope.envelope import Scoped, seal
from execution_envelope.errors import InvalidField
from execution_envelope.grant import MAX_NAME, label
from execution_envelope.ledger import SqliteLedger, verify
from execution_envelope.lifecycle import Sealed
from execution_envelope.reconciliation import Liveness
from execution_envelope.resources import parse_amount, parse_quantity
from execution_envelope.testing import START, ask
from tests import strategies

assert strategies  # it loads the settings

# Put together when the test runs, so that no scanner takes this file for a leak. What varies from one value to the
# next is `SECRET`: it is what must not be found.
SECRET = "Zq7Xw2Rt9" + "Lm4Kp8Vb3" + "Nc6Hd1Gs5" + "Jf0Ty"
UPPER = "ZQ7XW2RT" + "4LMKPVB3"
HEX = "9f3c1a7e5b2d" + "8046c1f7e3a9" + "5d20b4f6"


def words(*parts: str) -> str:
    return "".join(parts)


def b64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


EXAMPLES = {
    "private-key": words("-----BEGIN RSA PRIV", "ATE KEY-----\n", SECRET, "\n-----END RSA PRIV", "ATE KEY-----"),
    "jwe": words(b64('{"alg":"dir","enc":"A256GCM"}'), "..", SECRET[:16], ".", SECRET, ".", SECRET[:22]),
    "jwt": words(b64('{"alg":"HS256"}'), ".", b64('{"sub":"dana"}') + SECRET, ".", SECRET),
    "github": words("gh", "p_", SECRET, SECRET)[:40],
    "gitlab": words("gl", "pat-", SECRET),
    "anthropic": words("sk-", "ant-", SECRET),
    "openai": words("sk-", "proj-", SECRET),
    "huggingface": words("h", "f_", SECRET),
    "aws-access-key": words("AK", "IA", UPPER),
    "aws-secret-key": words("aws_secret_", "access_key=", SECRET, SECRET)[:62],
    "azure": words("DefaultEndpointsProtocol=https;Account", "Key=", SECRET, SECRET, SECRET)[:126] + "==",
    "google-api-key": words("AI", "za", SECRET, "abc"),
    "google-oauth": words("ya", "29.", SECRET),
    "slack-webhook": words("https://hooks.", "slack.com/services/T000/B000/", SECRET),
    "slack": words("xo", "xb-", SECRET),
    "stripe": words("sk_", "live_", SECRET),
    "npm": words("np", "m_", SECRET, "abcd"),
    "pypi": words("py", "pi-AgE", SECRET, SECRET),
    "nvidia": words("nv", "api-", SECRET, SECRET),
    "sendgrid": words("S", "G.", SECRET, ".", SECRET),
    "vault": words("hv", "s.", SECRET),
    "kamiwaza": words("k", "z_", SECRET),
    "databricks": words("da", "pi", HEX),
    "groq": words("gs", "k_", SECRET, SECRET)[:56],
    "replicate": words("r", "8_", SECRET, SECRET)[:40],
    "xai": words("xa", "i-", SECRET, SECRET, SECRET)[:84],
    "perplexity": words("pp", "lx-", SECRET, SECRET)[:53],
    "pinecone": words("pc", "sk_abcde_", SECRET, SECRET),
    "langsmith": words("ls", "v2_pt_", HEX, "_0123456789"),
    "docker": words("dckr_", "pat_", SECRET)[:36],
    "digitalocean": words("do", "p_v1_", HEX, HEX),
    "telegram": words("123456", "789:AA", SECRET, "abcdef")[:45],
    "authorization": words("Bea", "rer ", SECRET),
    "url-signature": words("https://b.example/x.csv?X-Amz-Expires=60&X-Amz-Sign", "ature=", SECRET),
    "url-password": words("postgres", "://app:", SECRET, "@db"),
}
SECRETS = {
    name: next(secret for secret in (UPPER, HEX, SECRET[:16]) if secret in text) for name, text in EXAMPLES.items()
}

formats = pytest.mark.parametrize("name", FORMATS)


def test_there_is_an_example_for_every_format() -> None:
    assert EXAMPLES.keys() == FORMATS.keys()
    assert all(SECRETS[name] in text for name, text in EXAMPLES.items())


@formats
def test_the_marker_names_the_format(name: str) -> None:
    text = f"it said: {EXAMPLES[name]}"
    assert marker(name) in redact_text(text)
    assert SECRETS[name] not in redact_text(text)
    assert contains(text) and contains(redact_text(text))
    assert redact_text(redact_text(text)) == redact_text(text)


def everywhere(secret: str) -> Ask:
    """An ask with the secret in every place that takes text."""
    return Ask(
        kind="model.deploy",
        operation=f"deploy {secret}",
        target=Target(f"model {secret}", f"id\n{secret}", f"version {secret}"),
        subject=Subject(
            f"user {secret}",
            f"dana\t{secret}",
            tenant=f'"{secret}"',
            roles=[f"role {secret}"],
            delegation=[(f"user {secret}", f"erin {secret}")],
            method=f"oidc {secret}",
            issuer=f"issuer {secret}",
            session=f"session {secret}",
        ),
        scope={
            "project": f"project\n{secret}",
            "regions": ["eu", secret],
            "purpose": Scoped(f"purpose {secret}", "established", f"by {secret}"),
            "hints": {"note": secret},
        },
        requested={"gpu": 1},
        constraints={
            "engine": f"--api-key\n{secret}",
            "args": ["x", {"deep": secret}],
            "large": [*["x" * 1000] * 5, secret],
            "bottomless": {"a": {"b": {"c": {"d": {"e": {"f": {"g": secret}}}}}}},
            "long": "x" * MAX_TEXT + " " + secret,
        },
        entrypoint=f"POST /{'x' * 10} {secret}",
        schema=f"Schema {secret}",
        body={"key": secret, secret: "value", "env": {"PASSWORD": f"hunter2 {secret}", f"n {secret}": 1}},
        secrets=["env.*"],
        request_id=f"request {secret}",
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        tracestate=f"state {secret}",
        idempotency_key=f"key {secret}",
        facets={"ns.plain": (f"producer {secret}", f"schema {secret}", {"a": f"x\n{secret}", secret: 1})},
    )


LISTED = """
identity.subject.type identity.subject.id identity.tenant identity.roles.0
identity.delegation.0.type identity.delegation.0.id
identity.authentication.method identity.authentication.issuer identity.authentication.session
execution.operation execution.entrypoint execution.target.type execution.target.id execution.target.version
execution.request.schema request.key request.* request.env.PASSWORD
scope.project.value scope.regions.value.1 scope.purpose.value scope.purpose.by scope.hints.note.value
requested.constraints.engine.value requested.constraints.args.value.1.deep requested.constraints.long.value
requested.constraints.large.value.cut.credential requested.constraints.bottomless.value.a.b.c.d.e.f.cut.credential
correlation.request_id correlation.tracestate correlation.idempotency_key
correlation.facets.ns.plain.producer correlation.facets.ns.plain.schema correlation.facets.ns.plain.text
"""


@formats
@pytest.mark.anyio
async def test_no_byte_of_it_is_in_the_ledger(name: str, tmp_path: Path) -> None:
    secret, needle = EXAMPLES[name], SECRETS[name].encode()
    ledger = SqliteLedger(tmp_path / "ledger.db")

    def hook(envelope: Any) -> Decision:
        return Decision.warn(f"careful {secret}")

    async def prober(record: Any) -> Liveness:
        return Liveness.gone(f"gone {secret}")

    controller = AdmissionController(ledger, component="backend", hooks=[Rule("h", hook)])
    admission = await controller.begin(everywhere(secret))
    await admission.effective(
        {"gpu": 1},
        cause="policy",
        because=f"so {secret}",
        constraints={"engine": secret, "n": [secret]},
        by="by",
    )
    await admission.attempt([Candidate(f"node {secret}", "refused", f"full {secret}")], reason=f"no room {secret}")
    await admission.bind("job", "job-1", owner="owner")
    await admission.grant(
        Grant(
            resources={"gpu": 1},
            part="0",
            route={"host": f"at {secret}"},
            honoured=["engine"],
            because={"args": ("policy", f"because {secret}")},
            constraints={"engine": {"args": secret}},
            candidates=[Candidate(f"node {secret}", "chosen", f"best {secret}")],
        )
    )
    await admission.used({"gpu": 1}, part="0", key="report")
    await admission.release("0", reason=f"done {secret}")
    await admission.leave(failed=(f"Code {secret}", f"message {secret}"))
    other = await controller.resume(admission.id, by="node")
    await other.fail(f"Code {secret}", f"message {secret}")
    await other.complete(f"late {secret}")

    for end in ("reject", "cancel", "leave"):
        another = await controller.begin(ask())
        if end == "reject":
            await another.reject(f"code {secret}", f"message {secret}")
        elif end == "cancel":
            await another.cancel(f"message {secret}")
        else:
            await another.leave(cancelled=f"message {secret}")
    await (await controller.begin(ask())).bind("deployment", "d", owner="node")
    assert (await controller.reconcile({"node": prober}, everything=True)).ids("gone")
    await controller.attempted(
        f"POST {secret}", f"reason {secret}", status=401, detail=f"detail {secret}", request_id=secret
    )

    for refusing in (Decision.deny("policy", f"no {secret}"), Decision.hold(f"ask {secret}"), RuntimeError(secret)):

        def refuse(envelope: Any, refusing: Any = refusing) -> Decision:
            if isinstance(refusing, Exception):
                raise refusing
            return refusing  # type: ignore[no-any-return]

        strict = AdmissionController(ledger, hooks=[Rule("h", refuse)])
        # What a hook raised is on the record; the caller is told that it failed.
        said = "hook h failed" if isinstance(refusing, Exception) else "redacted"
        with pytest.raises(Exception, match=said) as refused:
            await strict.begin(ask())
        assert needle.decode() not in str(refused.value)
        if isinstance(refusing, Exception):
            assert isinstance(refused.value, Denied)
            (verdict,) = (await strict.read(refused.value.envelope_id or "")).verdicts
            assert verdict.failure == "error" and "redacted" in (verdict.message or "")

    record = await controller.read(admission.id)
    sealed = next(event.data for event in record.events if isinstance(event.data, Sealed))
    assert set(LISTED.split()) <= set(sealed.redacted)
    assert not any(needle.decode() in path for path in sealed.redacted)
    assert controller.counters["redacted"] == len(sealed.redacted)
    assert verify(ledger).findings == ()

    written = bytes_of(tmp_path)
    assert written.keys() >= {"ledger.db", "ledger.db-wal"}
    assert [name for name, content in written.items() if needle in content] == []
    ledger.close()
    assert [name for name, content in bytes_of(tmp_path).items() if needle in content] == []


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@formats
def test_a_name_with_a_credential_is_refused_and_never_changed(name: str) -> None:
    with pytest.raises(InvalidField, match="expected a name without a credential") as refused:
        label(f"part {EXAMPLES[name]}", "grant.part")
    assert refused.value.field == "grant.part" and not pieces_of(EXAMPLES[name], str(refused.value))


def test_names_stay_as_they_are() -> None:
    jobs = [f"sk-learn-train-job-2026-000{n}" for n in (1, 2)]
    assert [label(job) for job in jobs] == jobs
    assert label(None) is None and label("é" * MAX_NAME) == "é" * MAX_NAME
    for bad in ("x" * (MAX_NAME + 1), "a\ud800", 5, b"x"):
        with pytest.raises(InvalidField) as refused:
            label(bad)  # type: ignore[call-overload]
        assert refused.value.field == "name"


@pytest.mark.anyio
async def test_names_that_look_like_a_key_lead_to_their_own_envelopes() -> None:
    controller = AdmissionController.open("memory://")
    ids = []
    for number in (1, 2):
        admission = await controller.begin(ask())
        await admission.bind("job", f"sk-learn-train-job-2026-000{number}")
        ids.append(admission.id)
    for number, id in enumerate(ids, start=1):
        assert (await controller.read("job", f"sk-learn-train-job-2026-000{number}")).id == id


def pieces_of(secret: str, text: str) -> list[str]:
    """The pieces of twelve characters of the secret part of a credential that are in `text`."""
    parts = [part for known in (SECRET, UPPER, HEX) for part in [known] if part[:12] in secret]
    whole = max(parts, key=len)
    return [whole[n : n + 12] for n in range(len(whole) - 11) if whole[n : n + 12] in text]


class Odd:
    """No JSON."""


def refusals(text: str) -> list[Callable[[], Any]]:
    """Calls that refuse `text`, wherever it is put."""
    key = text.strip() if re.fullmatch(r"[A-Za-z0-9_.:/-]{1,128}", text.strip()) else "key"
    overrides: list[dict[str, Any]] = [
        {"kind": text},
        {"scope": {text: "x"}},
        {"scope": {"hints": {text + "\n": "x"}}},
        {"scope": {"regions": text}},
        {"scope": text},
        {"requested": {text: 1}},
        {"requested": {"gpu": text}},
        {"requested": {"memory": {"amount": 1, "per": text}}},
        {"requested": {"memory": {"amount": 1, "floor": text}}},
        {"requested": text},
        {"constraints": {text + "\n": 1}},
        {"constraints": {key: {key: Odd()}}},
        {"constraints": text},
        {"facets": {"a.b": text}},
        {"facets": {key: ("p", None, Odd())}},
        {"subject": Subject("user", "d", roles=text)},
        {"subject": Subject("user", "d", delegation=[text])},  # type: ignore[list-item]
        {"secrets": text},
        {"target": text},
    ]
    grants: list[dict[str, Any]] = [
        {"part": text},
        {"honoured": text},
        {"honoured": [text]},
        {"basis": text},
        {"because": {"gpu": text}},
        {"because": {"gpu": (text, "x")}},
        {"because": {text: ("policy", "x")}},
        {"because": {text: "x"}},
        {"route": {text: "x"}},
        {"route": {text: 5}},
        {"route": text},
        {"constraints": {text: 1}},
        {"constraints": {"a": {key: Odd()}}},
        {"resources": {text: 1}},
        {"resources": {"gpu": text}},
        {"candidates": text},
        {"candidates": [Candidate("n", text)]},  # type: ignore[arg-type]
    ]
    return [
        *(lambda given=given: seal(ask(**given), id="x", now=START) for given in overrides),
        *(lambda given=given: Grant(**{"resources": {"gpu": 1}, **given}).fact() for given in grants),
        lambda: parse_amount("gpu", text, field="f"),
        lambda: parse_amount("cost", [text], field="f"),
        lambda: parse_quantity(text, 1, field="f"),
    ]


@formats
@given(before=st.integers(0, 130), behind=st.sampled_from(["", " x", "\n", "-"]))
@settings(max_examples=15)
def test_no_piece_of_a_credential_is_in_an_error(name: str, before: int, behind: str) -> None:
    text = "x" * before + " " + EXAMPLES[name] + behind
    for refuse in refusals(text):
        try:
            refuse()
        except InvalidField as error:
            assert not pieces_of(EXAMPLES[name], f"{error} {error.field}")


@formats
def test_the_refusals_refuse(name: str) -> None:
    refused = 0
    for refuse in refusals(EXAMPLES[name]):
        try:
            refuse()
        except InvalidField:
            refused += 1
    assert refused > 34


def test_what_is_shown_is_short_and_plain() -> None:
    assert shown("x" * 80) == f"`{'x' * 61}...`"
    assert (shown(5), shown(None), shown(10**100), shown(["a"])) == ("`5`", "`None`", "`a huge number`", "`list`")
    assert brief("a\ud800") == "a?"


@pytest.mark.parametrize("bad", [None, 5, b"x", ["x"]])
def test_a_message_that_is_no_text_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(InvalidField) as refused:
        scrub(bad, field="fail.message")
    assert refused.value.field == "fail.message"


def test_removed_values_go_from_later_texts_before_anything_is_cut() -> None:
    removed = frozenset({"hunter2hunter2", "hunter2"})
    text = scrub("a" * 495 + "hunter2hunter2, hunter2", removed=removed)
    assert "hunter" not in text and text.startswith("a" * 495 + "[reda")
    assert scrub("it said hunter2hunter2", removed=removed) == "it said [redacted:field]"


def test_named_fields_of_every_family_are_removed_and_known() -> None:
    sealed = seal(
        ask(
            constraints={"engine": {"password": "opensesame", "name": "vllm"}, "a.b": {"c": "short"}},
            facets={"ns.name": ("p", None, {"pin": "123456789"}), "ns.other": ("p", None, {"pin": "x", "n": 1})},
            scope={"project": "p", "hints": {"note": Scoped("between us", "established", "token"), "plain": "yes"}},
            schema="S",
            body={"env": {"A": "from the env", "url": words("db", "://app:passw0rd", "@h")}, "constraints": 1},
            secrets=["env.A", "constraints.engine.password", "facets.ns.name", "facets.*.pin", "scope.hints.note"],
        ),
        id="x",
        now=START,
    )
    text = sealed.body.decode()
    for gone in ("opensesame", "123456789", "between us", "from the env"):
        assert gone not in text and gone not in repr(sealed)
    assert sealed.removed >= {"opensesame", "123456789", "between us", "from the env", "passw0rd"}
    constraints = sealed.envelope.requested.constraints
    assert constraints["engine"].value == {"password": "[redacted:field]", "name": "vllm"}
    assert constraints["a.b"].value == {"c": "short"}
    facets = sealed.envelope.correlation.facets
    assert (facets["ns.name"].text, facets["ns.other"].text) == (
        '"[redacted:field]"',
        '{"n":1,"pin":"[redacted:field]"}',
    )
    hints = sealed.envelope.scope.hints
    assert hints["note"] == Scoped("[redacted:field]", "established", "token") and hints["plain"].value == "yes"
    assert set(sealed.redacted) >= {"request.env.A", "requested.constraints.engine.value.password"}


def test_credentials_that_were_found_are_known_too() -> None:
    sealed = seal(ask(constraints={"args": ["--key", EXAMPLES["github"]], "n": 1}), id="x", now=START)
    assert sealed.removed == {EXAMPLES["github"]}
    assert seal(ask(), id="x", now=START).removed == frozenset()


def test_a_user_of_a_url_is_removed_when_it_is_a_credential_itself() -> None:
    assert redact_text(f"https://{EXAMPLES['github']}@github.com/a") == "https://[redacted:github]@github.com/a"
    assert redact_text("https://dana@github.com/a") == "https://dana@github.com/a"
    assert SECRETS["telegram"] not in redact_text(f"https://api.telegram.org/bot{EXAMPLES['telegram']}/getMe")


@pytest.mark.parametrize(
    "name",
    [
        "X-Amz-Signature",
        "X-Amz-Security-Token",
        "X-Goog-Signature",
        "Signature",
        "sig",
        "token",
        "access_token",
        "api_key",
    ],
)
def test_what_signs_a_url_goes_and_the_rest_of_it_stays(name: str) -> None:
    for part, each in (("?a=1&", name), ("?", name), ("#", name.upper()), ("?a=1&amp;", name), ("?a=1\\u0026", name)):
        start = f"https://bucket.example/x.csv{part}{each}="
        for value in (SECRET, "5", f"{SECRET}%2F%3D", EXAMPLES["jwt"], EXAMPLES["aws-access-key"] + "~"):
            signed = f"{start}{value}&b=2"
            assert redact_text(signed) == f"{start}[redacted:url-signature]&b=2"
            assert suspicious(signed) and not clean([signed])
    kept = f"next_{name}=5, {name}=5; {name} = 5 & {name} ?{name} https://example.com/{name}=5?my{name}=5&{name}s=5"
    assert redact_text(kept) == kept and not suspicious(kept)


@pytest.mark.parametrize("kind", ["proj", "svcacct", "admin"])
def test_the_keys_that_openai_documents(kind: str) -> None:
    for key in (f"sk-{kind}-{SECRET}", "sk-" + (SECRET * 2)[:48], f"sk-{SECRET}T3Blbk" + f"FJ{SECRET}"):
        assert redact_text(key) == "[redacted:openai]"
    assert redact_text("sk-" + (SECRET * 2)[:47]) == "sk-" + (SECRET * 2)[:47]


@formats
@pytest.mark.parametrize("before", ["", "\n", "\t", '"', "=", "\\", "_", "(", "key:", "é"])
def test_it_is_found_behind_anything(name: str, before: str) -> None:
    secret = EXAMPLES[name]
    # Behind a letter of the URL itself the scheme is another one; the password goes all the same.
    assert SECRETS[name] not in redact_text(before + secret)
    result = seal(
        ask(constraints={"a": before + secret}, facets={"f": ("p", None, [before + secret])}), id="x", now=START
    )
    assert SECRETS[name] not in result.body.decode()
    assert result.redacted == ("requested.constraints.a.value", "correlation.facets.f.text")
    # Alone in a plain field, where the JSON text around it hides what stands before it.
    alone = seal(ask(entrypoint=before + secret), id="x", now=START)
    assert SECRETS[name] not in alone.body.decode() and alone.redacted == ("execution.entrypoint",)


ORDINARY = [
    "a3f1c9e0" * 8,
    "01890a5d-ac96-774b-bcce-b302099a8057",
    "sha256:" + "0123456789abcdef" * 4,
    "basic training",
    "basic internationalization",
    "Basic misunderstandings",
    "the basic HuggingFaceTB/SmolLM2-135M-Instruct model",
    "Bearer of news",
    "bearer authentication-required",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-Embedding-0.6B",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "hf_transfer",
    "hf_hub_download",
    "npm_config_registry",
    "sk-learn",
    "sk-learn-compatible-estimators",
    "risk-adjusted-return-on-capital-2026",
    "task-01890a5d-ac96-774b-bcce-b302099a8057",
    "https://login.example/realms/acme?x=1",
    "http://localhost:8000/v1/chat/completions",
    "user@example.com",
    "s3://bucket/path/to/object",
    "postgres://app@db/name",
    "-----BEGIN CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----",
    "eyJ",
    "hvs.",
    "SG.",
    "AKIA",
    "ya29",
    "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    "nvidia.com/gpu",
    "sk-learn-train-job-2026-0001",
    "sk-01890a5d-ac96-774b-bcce-b302099a8057",
    "xai-grok-mini",
    "pplx-70b-online-2026-instruct-preview",
    "r8_quantized",
    "gsk_threshold",
    "dapi" + "0123456789abcdef" * 4,
    "lsv2_migration_of_the_table",
    "do_v1_0",
    "1700000000:some-slug-of-exactly-35-characters-",
    "12:30:45",
    "AccountKey=see-vault",
    "aws_secret_access_key=your-key-here",
    "https://hooks.slack.com/",
    "eyJ-a.b.c.d.e",
    "docker.io/library/python:3.11-slim",
    "--tensor-parallel-size 2",
    "gpu_memory_utilization=0.4",
    "",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact_text(text) == text
    assert not contains(text)
    assert seal(ask(entrypoint=text), id="x", now=START).redacted == ()


HOSTILE = [
    "eyJaaaaaaaa-",
    "eyJaaaaaaaa.",
    "eyJaaaaaaaa.eyJaaaaaaaa-",
    "sk-",
    "sk-a",
    "sk-" + "a" * 30 + " ",
    "bearer ",
    "basic a",
    "://a:",
    "-----BEGIN A ",
    "-----BEGIN PRIVATE KEY-----",
    "github_pat_",
    "SG." + "a" * 20,
    "sk-aT3BlbkFJ",
    "T3BlbkFJ-sk-",
    "123456:",
    "1",
    "aws_secret_access_key ",
    "AccountKey=",
    "eyJaaaaaaaa..aaaaaaaaaaaaaaaaa.a",
    "hooks.slack.com/services/",
    "a",
]


@pytest.mark.parametrize("seed", HOSTILE, ids=[seed[:12] for seed in HOSTILE])
def test_no_text_makes_the_search_slow(seed: str) -> None:
    # Timed in processor time, and ten times as much text takes about ten times as long: a square would be a hundred.
    import time

    def spent(size: int) -> float:
        text = (seed * (size // len(seed) + 1))[:size]
        start = time.process_time()
        redact_text(text)
        return time.process_time() - start

    assert spent(200_000) < 40 * max(spent(20_000), 0.005)


def test_messages_are_cut_and_keep_the_digest_of_the_whole() -> None:
    text = scrub("x" * 600)
    assert text.startswith("x" * 500 + "... [cut: 600 characters, sha256 ")
    assert "\ud800" not in scrub("a\ud800")
    json.dumps(scrub("a\ud800")).encode()


def test_what_was_cut_off_says_when_it_held_a_credential() -> None:
    assert marker("cut") in scrub("x" * 600 + " " + EXAMPLES["github"])
    assert marker("cut") not in scrub(EXAMPLES["github"] + "x" * 600)


@pytest.mark.anyio
async def test_a_denial_keeps_its_reasons_without_the_credential() -> None:
    hook = Rule("h", lambda e: Decision.deny("policy", f"not with {EXAMPLES['github']}"))
    with pytest.raises(Denied) as denied:
        await AdmissionController.open("memory://", hooks=[hook]).begin(ask())
    assert denied.value.reasons[0].message == "not with [redacted:github]"


def holds_one(text: str) -> bool:
    """Whether a pattern matches or a marker is there, found by looking for each."""
    return "[redacted:" in text or any(re.search(pattern, text) for pattern in FORMATS.values())


around = st.text(max_size=8) | st.sampled_from(
    ["", "\n", "\t", "\x08", '"', "\\", "=", "_", "-", "a", "é", "\u0131", " x y "]
)
secrets = st.sampled_from(sorted(EXAMPLES.values())) | st.sampled_from([marker("jwt"), *HOSTILE, *ORDINARY])
mixed = st.lists(around | secrets, max_size=4).map("".join)


@formats
@given(data=st.data())
@settings(max_examples=25)
def test_every_text_that_matches_a_format_is_suspicious(name: str, data: st.DataObject) -> None:
    text = data.draw(around) + data.draw(st.from_regex(FORMATS[name])) + data.draw(around)
    assert suspicious(text) or not holds_one(text)
    whole = data.draw(st.lists(mixed, max_size=3))
    assert suspicious("\n".join([*whole, text])) or not holds_one(text)


@given(mixed)
def test_what_is_not_suspicious_holds_none(text: str) -> None:
    assert contains(text) == holds_one(text)
    assert suspicious(text) or not holds_one(text)
    # As it is, and as a text in JSON.
    for texts in ([text], [json.dumps({"a": [text]}, ensure_ascii=False)], ["x", text, "y"]):
        assert not clean(texts) or not holds_one(text)
        assert not clean(texts) or redact_text(text) == text


def test_letters_that_only_look_like_others_are_suspicious() -> None:
    odd = [chr(n) for n in range(128, sys.maxunicode + 1) if re.fullmatch("(?i:[bearsic])", chr(n))]
    assert odd == ["\u0130", "\u0131", "\u017f"]
    assert all(suspicious(f"ba{letter}ic") for letter in odd)


def test_the_name_of_a_scheme_alone_announces_nothing() -> None:
    assert not any(suspicious(text) for text in ("bearer", "by bearer\nPOST /runtime", "Basic checks", "bearer 0123"))
    assert suspicious("BEARER\n0123456789abcdef") and suspicious("bearer sk-1") and suspicious("bearer, hf_1")


def test_ordinary_requests_are_looked_through_but_once() -> None:
    assert [text for text in ORDINARY if not clean([text])] == []


def outcome(given: Ask) -> Any:
    try:
        return seal(given, id="01890a5d-ac96-774b-bcce-b302099a8057", now=START)
    except InvalidField as error:
        return error.field, str(error)


json_secrets = st.recursive(
    mixed | st.none() | st.booleans() | st.floats() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(mixed, inner, max_size=3),
    max_leaves=6,
)
named = st.dictionaries(strategies.names | mixed, json_secrets, max_size=3)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "operation": mixed,
            "entrypoint": mixed,
            "target": st.builds(Target, mixed, mixed, st.none() | mixed),
            "subject": st.builds(
                Subject,
                mixed,
                mixed,
                tenant=mixed,
                roles=st.lists(mixed, max_size=2),
                delegation=st.lists(st.tuples(mixed, mixed), max_size=2),
                method=mixed,
                issuer=mixed,
                session=mixed,
            ),
            "scope": st.fixed_dictionaries(
                {},
                optional={
                    "project": mixed | st.builds(Scoped, mixed, st.just("established"), mixed),
                    "regions": st.lists(mixed, max_size=2),
                    "hints": st.dictionaries(strategies.names | mixed, mixed, max_size=2),
                },
            ),
            "constraints": named,
            "client_defaults": named,
            "schema": mixed,
            "body": json_secrets | named,
            "secrets": st.lists(st.sampled_from(["*", "*.*", "a", "constraints.*", "facets.*.*"]), max_size=2),
            "request_id": mixed,
            "tracestate": mixed,
            "traceparent": st.just("00-" + "a" * 32 + "-" + "b" * 16 + "-01"),
            "idempotency_key": mixed,
            "part_of": mixed,
            "facets": st.dictionaries(strategies.names, st.tuples(mixed, st.none() | mixed, json_secrets), max_size=2),
        },
    )
)
@settings(max_examples=300)
def test_looking_once_finds_what_looking_at_every_text_finds(overrides: dict[str, Any]) -> None:
    once = outcome(ask(**overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "clean", lambda texts: False)
        patch.setattr(credentials, "suspicious", lambda text: True)
        each = outcome(ask(**overrides))
    assert once == each


@pytest.mark.parametrize("depth", [1, 20_000])
def test_what_has_a_secret_name_is_taken_out_however_deep_it_is(depth: int) -> None:
    deep: Any = {"name-hunter2": ["value-hunter2"]}
    for _ in range(depth):
        deep = [deep]
    sealed = seal(ask(body={"env": {"A": deep}}, schema="s/1", secrets=["env.*"]), id="e", now=START)
    assert sealed.redacted == ("request.env.A",)
    assert sealed.removed == {"name-hunter2", "value-hunter2"}

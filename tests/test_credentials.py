"""Not one byte of a credential in a documented format reaches the ledger's files; ordinary text is left alone."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from execution_envelope import AdmissionController, Ask, Candidate, Decision, Denied, Grant, Rule, Subject, Target
from execution_envelope.credentials import FORMATS, MAX_TEXT, contains, marker, redact_text, scrub
from execution_envelope.envelope import Scoped, seal
from execution_envelope.ledger import SqliteLedger, verify
from execution_envelope.lifecycle import Sealed
from execution_envelope.reconciliation import Liveness
from execution_envelope.testing import START, ask

# Put together when the test runs, so that no scanner takes this file for a leak. What varies from one value to the
# next is `SECRET`: it is what must not be found.
SECRET = "Zq7Xw2Rt9" + "Lm4Kp8Vb3" + "Nc6Hd1Gs5" + "Jf0Ty"
UPPER = "ZQ7XW2RT" + "4LMKPVB3"


def words(*parts: str) -> str:
    return "".join(parts)


def b64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


EXAMPLES = {
    "private-key": words("-----BEGIN RSA PRIV", "ATE KEY-----\n", SECRET, "\n-----END RSA PRIV", "ATE KEY-----"),
    "jwt": words(b64('{"alg":"HS256"}'), ".", b64('{"sub":"dana"}') + SECRET, ".", SECRET),
    "github": words("gh", "p_", SECRET, SECRET)[:40],
    "gitlab": words("gl", "pat-", SECRET),
    "anthropic": words("sk-", "ant-", SECRET),
    "openai": words("sk-", "proj-", SECRET),
    "huggingface": words("h", "f_", SECRET),
    "aws-access-key": words("AK", "IA", UPPER),
    "google-api-key": words("AI", "za", SECRET, "abc"),
    "google-oauth": words("ya", "29.", SECRET),
    "slack": words("xo", "xb-", SECRET),
    "stripe": words("sk_", "live_", SECRET),
    "npm": words("np", "m_", SECRET, "abcd"),
    "pypi": words("py", "pi-AgE", SECRET, SECRET),
    "nvidia": words("nv", "api-", SECRET, SECRET),
    "sendgrid": words("S", "G.", SECRET, ".", SECRET),
    "vault": words("hv", "s.", SECRET),
    "kamiwaza": words("k", "z_", SECRET),
    "authorization": words("Bea", "rer ", SECRET),
    "url-password": words("postgres", "://app:", SECRET, "@db"),
}
SECRETS = {name: UPPER if UPPER in text else SECRET[:18] for name, text in EXAMPLES.items()}

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

    controller = AdmissionController(ledger, component=f"backend {secret}", hooks=[Rule("h", hook)])
    admission = await controller.begin(everywhere(secret))
    await admission.effective(
        {"gpu": 1},
        cause="policy",
        because=f"so {secret}",
        constraints={"engine": secret, f"n {secret}": [secret]},
        by=f"by {secret}",
    )
    await admission.attempt([Candidate(f"node {secret}", "refused", f"full {secret}")], reason=f"no room {secret}")
    kind = "job" if ":" in secret else f"job {secret}"[:90]
    await admission.bind(kind, secret[:100], owner=f"owner {secret}")
    await admission.grant(
        Grant(
            resources={"gpu": 1},
            part=f"part {secret}",
            route={"host": f"at {secret}", f"r {secret}": "x"},
            honoured=[f"engine {secret}"],
            because={f"args {secret}": ("policy", f"because {secret}")},
            constraints={"engine": {"args": secret}, f"c {secret}": secret},
            candidates=[Candidate(f"node {secret}", "chosen", f"best {secret}")],
            by=f"placer {secret}",
        )
    )
    await admission.ready(f"part {secret}")
    await admission.used({"gpu": 1}, part=f"part {secret}", key=f"report {secret}")
    await admission.release(f"part {secret}", reason=f"done {secret}")
    await admission.leave(failed=(f"Code {secret}", f"message {secret}"))
    other = await controller.resume(admission.id, by=f"node {secret}")
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
        with pytest.raises(Exception, match="redacted") as refused:
            await strict.begin(ask())
        assert needle.decode() not in str(refused.value)

    # What is read back is readable, and the part's grant, release and use met under one name.
    record = await controller.read(admission.id)
    assert list(record.grants) == [scrub(f"part {secret}")] and record.held == {}
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


@pytest.mark.anyio
async def test_a_reference_with_a_credential_is_still_found(tmp_path: Path) -> None:
    reference = EXAMPLES["url-password"]
    controller = AdmissionController.open("memory://")
    admission = await controller.begin(ask())
    await admission.bind("job", reference)
    assert (await controller.read("job", reference)).id == admission.id


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

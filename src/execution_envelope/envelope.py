"""The envelope: five field families, sealed once, with a canonical form and a digest.

`Ask` is what an adapter writes; `seal` turns it into an `Envelope`, the record that never changes afterwards. The
canonical form is RFC 8785 (JSON Canonicalization Scheme), held by what may be in it: integers up to 2^53 - 1, no
floats, ASCII keys. Then the fast encoder's sorted output *is* canonical, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, NoReturn, TypeAlias, cast, get_args

import msgspec

from execution_envelope import credentials
from execution_envelope.credentials import brief, group, invalid, listed, mapped, shown
from execution_envelope.credentials import optional_at as _optional
from execution_envelope.credentials import text_at as _text
from execution_envelope.errors import InvalidField, Unidentified
from execution_envelope.resources import Provenance, Quantity, parse_quantity

SCHEMA_VERSION: Final = "1"

Kind: TypeAlias = Literal["model.deploy", "inference", "evaluation", "data.move", "agent.run", "maintenance"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)
LINKS: Final = ("part_of", "runs_on", "supersedes")

#: How many entries each collection of an ask may hold. More is refused: they are written by the backend's own code.
MAX_ENTRIES: Final = {
    "roles": 64,
    "delegation": 16,
    "scope.hints": 32,
    "scope.regions": 32,
    "requested": 32,
    "constraints": 64,
    "facets": 16,
}
#: A constraint or facet larger than this many bytes, or deeper than `MAX_DEPTH`, is cut; its digest stays.
MAX_VALUE_BYTES: Final = 4096
MAX_DEPTH: Final = 6
#: How many paths of removed credentials one envelope lists; the last one then says how many more there were.
MAX_REDACTED: Final = 100

#: What a path in `Ask.secrets` starts with that is not of the body alone.
_FAMILIES: Final = ("constraints.", "facets.", "scope.hints.")
_KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class _Sealed(dict[str, Any]):
    """A mapping of the sealed part: readable as a dict, refuses every change."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the sealed part of an envelope does not change; record an event instead")

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse


class _Struct(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Frozen all the way down, also after a round trip through JSON."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if type(value) in (dict, list):
                msgspec.structs.force_setattr(self, name, _freeze(value))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return _Sealed({key: _freeze(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(_freeze(item) for item in value)
    return value


class Party(_Struct, frozen=True):
    """Somebody or something that acts: `type` such as ``user``, ``service``, ``agent``."""

    type: str
    id: str


class Authentication(_Struct, frozen=True):
    """How the subject was authenticated. Never the credential itself."""

    method: str
    issuer: str | None = None
    session: str | None = None


class Identity(_Struct, frozen=True):
    """Who asked. `delegation` says who acts for whom, outermost first; the subject is the one acting."""

    subject: Party
    tenant: str | None = None
    roles: tuple[str, ...] = ()
    delegation: tuple[Party, ...] = ()
    authentication: Authentication | None = None


class Target(_Struct, frozen=True):
    """What the execution is about: a model, a data set, an agent."""

    type: str
    id: str
    version: str | None = None


class SourceRequest(_Struct, frozen=True):
    """The service-specific request: the name of its schema and the SHA-256 of its body after secrets were taken out."""

    schema: str
    sha256: str


class Execution(_Struct, frozen=True):
    """What was asked."""

    kind: Kind
    operation: str
    target: Target
    entrypoint: str | None = None
    request: SourceRequest | None = None


class Scoped(_Struct, frozen=True):
    """A scope value and where it comes from: the caller asserted it, or the backend established it, and by what."""

    value: str | int | tuple[str, ...]
    provenance: Literal["asserted", "established"] = "asserted"
    by: str | None = None


class Scope(_Struct, frozen=True):
    """Under which policy-relevant scope. `hints` are governance hints, open names."""

    project: Scoped | None = None
    workroom: Scoped | None = None
    environment: Scoped | None = None
    purpose: Scoped | None = None
    classification: Scoped | None = None
    regions: Scoped | None = None
    priority: Scoped | None = None
    hints: Mapping[str, Scoped] = {}


class Constraint(_Struct, frozen=True):
    """A demand that is not an amount: engine, device, region. Open names, JSON values without floats."""

    value: Any
    provenance: Provenance = "asserted"


class Requested(_Struct, frozen=True):
    """Which resources, as the caller wrote them, before defaults and estimates."""

    resources: Mapping[str, Quantity] = {}
    constraints: Mapping[str, Constraint] = {}


class Facet(_Struct, frozen=True):
    """An extension: who produced it, its schema, its JSON text (cut when large), the digest of the whole."""

    producer: str
    text: str
    sha256: str
    schema: str | None = None


class Correlation(_Struct, frozen=True):
    """How it ties together. `id` is a UUIDv7, `created_at` RFC 3339 in UTC with microseconds."""

    id: str
    schema_version: str
    created_at: str
    request_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    idempotency_key: str | None = None
    part_of: str | None = None
    runs_on: str | None = None
    supersedes: str | None = None
    facets: Mapping[str, Facet] = {}


class Envelope(_Struct, frozen=True):
    """The sealed record of one request for execution."""

    identity: Identity
    execution: Execution
    scope: Scope
    requested: Requested
    correlation: Correlation

    @property
    def id(self) -> str:
        return self.correlation.id


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks. ``Subject("user", "dana", tenant="acme", roles=["operator"])``.

    `delegation` lists those on whose behalf the subject acts, outermost first, as ``(type, id)`` pairs.
    """

    type: str
    id: str
    tenant: str | None = None
    roles: Sequence[str] = ()
    delegation: Sequence[tuple[str, str]] = ()
    method: str | None = None
    issuer: str | None = None
    session: str | None = None


def established(value: str | int | Sequence[str], *, by: str) -> Scoped:
    """A scope value that the backend found out itself, by a token, a server default or a policy."""
    return Scoped(
        value if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value), "established", by
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What an adapter says of one request: the families in the words of people, nothing sealed yet.

    `requested` maps resource names to amounts (``"512MiB"``, ``2``, ``per_replica("1GiB")``), `constraints` open
    names to JSON values; None is absent. `client_defaults` names values that a known client always sends: a value
    equal to one is recorded as *client default* and never reported as ignored. `body` is the service-specific
    request as it arrived; only its digest is sealed, taken after every credential in a documented format was removed.

    `secrets` names fields whose values are replaced by a marker before sealing, whatever their form; ``*`` stands for
    every key or index. A path is of `body` (``"env.*"``); one that starts with ``constraints``, ``facets`` or
    ``scope.hints`` is of that family too: ``"constraints.engine.password"``, ``"facets.ns.name"`` (all of its data),
    ``"scope.hints.note"``. `part_of`, `runs_on` and `supersedes` name an envelope id
    or a reference ``"deployment:ID"``. `facets` maps ``namespace.name`` to ``(producer, schema URL or None, data)``.
    """

    kind: str
    operation: str
    target: Target
    subject: Subject | None = None
    scope: Mapping[str, Any] = field(default_factory=dict)
    requested: Mapping[str, Any] = field(default_factory=dict)
    constraints: Mapping[str, Any] = field(default_factory=dict)
    client_defaults: Mapping[str, Any] = field(default_factory=dict)
    entrypoint: str | None = None
    schema: str | None = None
    body: Any = None
    secrets: Sequence[str] = ()
    request_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    idempotency_key: str | None = None
    part_of: str | None = None
    runs_on: str | None = None
    supersedes: str | None = None
    facets: Mapping[str, tuple[str, str | None, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SealedEnvelope:
    """An envelope with its canonical bytes and their SHA-256.

    `request_digest` is over execution, scope and requested: what "the same request" means for an idempotency key.
    `key_digest` identifies (tenant, subject, operation, key), None without a key. `redacted` lists the paths at
    which a credential was taken out. `removed` holds the texts that were taken out of the body and of what `secrets`
    names, so that later messages can be scrubbed of them; it is never stored.
    """

    envelope: Envelope
    body: bytes
    digest: str
    request_digest: str
    key_digest: str | None
    redacted: tuple[str, ...]
    removed: frozenset[str] = field(default=frozenset(), repr=False)


_encoder: Final = msgspec.json.Encoder(order="sorted")
_decoder: Final = msgspec.json.Decoder(Envelope)


def canonical(value: Any) -> bytes:
    """The canonical JSON bytes of a struct or of plain data without floats."""
    return _encoder.encode(value)


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def decode(body: bytes) -> Envelope:
    """Read an envelope back from its canonical bytes. Raises `msgspec.ValidationError` or `DecodeError`."""
    return _decoder.decode(body)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds: of fixed width, so that text order is time order."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"


def seal(ask: Ask, *, id: str, now: datetime) -> SealedEnvelope:
    """Validate, redact, freeze and digest an ask.

    Raises `InvalidField` naming the first field that cannot be sealed, and `Unidentified` when no subject is named.
    """
    redacted: list[str] = []
    secret: list[Any] = []
    named, ask = ask, _without_named(ask, secret)
    envelope = Envelope(
        identity=_identity(ask.subject),
        execution=_execution(ask, redacted, secret),
        scope=_scope(ask.scope),
        requested=_requested(ask),
        correlation=_correlation(ask, id, timestamp(now)),
    )
    body = _encode(envelope)
    # An escape in the JSON text may stand between the words of a credential, so that only its value shows it.
    if b"\\" in body or credentials.contains(body.decode()):
        clean = credentials.redact(msgspec.to_builtins(envelope), path="", found=lambda path: redacted.append(path[1:]))
        envelope = msgspec.convert(clean, Envelope)
        body = _encode(envelope)
    same = canonical([envelope.execution, envelope.scope, envelope.requested])
    key = None
    if ask.subject is not None and ask.idempotency_key is not None:
        key = key_digest(ask.subject, ask.operation, ask.idempotency_key)
    removed = set(credentials.strings(secret))
    if redacted:
        removed.update(credentials.literals([named.body, named.constraints]))
    literals = frozenset(text for text in removed if len(text) >= credentials.MIN_LITERAL)
    return SealedEnvelope(envelope, body, sha256(body), sha256(same), key, _paths(redacted), literals)


def _without_named(ask: Ask, secret: list[Any]) -> Ask:
    """The ask without what `secrets` names in its constraints, facets and hints; that goes into `secret`."""
    fields = [name for name in listed(ask.secrets, "secrets") if _text(name, "secrets").startswith(_FAMILIES)]
    if not fields:
        return ask
    facets = {name: group(facet, 3, f"facets.{brief(name)}") for name, facet in mapped(ask.facets, "facets").items()}
    scope = mapped(ask.scope, "scope")
    hints = mapped(scope.get("hints") or {}, "scope.hints")
    bare = {
        "constraints": mapped(ask.constraints, "constraints"),
        "facets": {name: data for name, (_, _, data) in facets.items()},
        "scope": {"hints": {name: v.value if isinstance(v, Scoped) else v for name, v in hints.items()}},
    }
    clean = credentials.remove_fields(bare, fields, found=lambda _, value: secret.append(value))
    return dataclasses.replace(
        ask,
        constraints=clean["constraints"],
        facets={name: (*facets[name][:2], data) for name, data in clean["facets"].items()},
        scope=dict(scope)
        | {"hints": {name: _dressed(hints[name], value) for name, value in clean["scope"]["hints"].items()}},
    )


def _dressed(before: Any, value: Any) -> Any:
    return msgspec.structs.replace(before, value=value) if isinstance(before, Scoped) else value


def _paths(redacted: Sequence[str]) -> tuple[str, ...]:
    """The paths as they are recorded: a path holds the caller's own names."""
    paths = list(dict.fromkeys(credentials.scrub(path) for path in redacted))
    if len(paths) > MAX_REDACTED:
        paths[MAX_REDACTED - 1 :] = [f"... and {len(paths) - MAX_REDACTED + 1} more"]
    return tuple(paths)


def _encode(envelope: Envelope) -> bytes:
    try:
        return canonical(envelope)
    except UnicodeEncodeError as error:
        raise InvalidField("ask", "expected text in valid Unicode, got a lone surrogate") from error


def _identity(subject: Subject | None) -> Identity:
    if subject is None:
        raise Unidentified("expected a subject, got none: name who asks in `Ask.subject` or by `identify`")
    if not isinstance(subject, Subject):
        raise invalid("identity.subject", f"expected a Subject, got {shown(subject)}")
    delegation = listed(subject.delegation, "identity.delegation", MAX_ENTRIES["delegation"])
    return Identity(
        subject=Party(_text(subject.type, "identity.subject.type"), _text(subject.id, "identity.subject.id")),
        tenant=_optional(subject.tenant, "identity.tenant"),
        roles=tuple(
            _text(role, "identity.roles") for role in listed(subject.roles, "identity.roles", MAX_ENTRIES["roles"])
        ),
        delegation=tuple(
            Party(_text(kind, "identity.delegation"), _text(name, "identity.delegation"))
            for kind, name in (group(pair, 2, "identity.delegation") for pair in delegation)
        ),
        authentication=None
        if subject.method is None
        else Authentication(
            _text(subject.method, "identity.authentication.method"),
            _optional(subject.issuer, "identity.authentication.issuer"),
            _optional(subject.session, "identity.authentication.session"),
        ),
    )


def _execution(ask: Ask, redacted: list[str], secret: list[Any]) -> Execution:
    if ask.kind not in KINDS:
        raise InvalidField("execution.kind", f"expected one of {', '.join(KINDS)}, got {shown(ask.kind)}")
    if not isinstance(ask.target, Target):
        raise InvalidField("execution.target", f"expected a Target, got {shown(ask.target)}")

    def take(path: str, value: Any) -> None:
        redacted.append(f"request.{path}")
        secret.append(value)

    request = None
    body = credentials.remove_fields(ask.body, listed(ask.secrets, "secrets"), found=take)
    if ask.schema is not None:
        try:
            body = credentials.redact(body, path="request", found=redacted.append)
            request = SourceRequest(_text(ask.schema, "execution.request.schema"), sha256(canonical(body)))
        except (TypeError, UnicodeEncodeError, RecursionError) as error:
            raise InvalidField("execution.request", f"expected a JSON body: {brief(str(error), 200)}") from error
    target = Target(
        _text(ask.target.type, "execution.target.type"),
        _text(ask.target.id, "execution.target.id"),
        _optional(ask.target.version, "execution.target.version"),
    )
    return Execution(
        kind=cast(Kind, ask.kind),
        operation=_text(ask.operation, "execution.operation"),
        target=target,
        entrypoint=_optional(ask.entrypoint, "execution.entrypoint"),
        request=request,
    )


def _scope(values: Mapping[str, Any]) -> Scope:
    fields: dict[str, Any] = {}
    for name, value in mapped(values, "scope").items():
        if value is None:
            continue
        if name == "hints":
            fields["hints"] = {
                _key(hint, "scope.hints"): _scoped(item, f"scope.hints.{hint}")
                for hint, item in mapped(value, "scope.hints", MAX_ENTRIES["scope.hints"]).items()
                if item is not None
            }
        elif name in Scope.__struct_fields__:
            fields[name] = _scoped(value, f"scope.{name}")
            if name == "regions" and isinstance(fields[name].value, str):
                raise InvalidField("scope.regions", f"expected a list of texts, got {shown(fields[name].value)}")
        else:
            names = ", ".join(Scope.__struct_fields__)
            raise invalid(f"scope.{brief(name)}", f"expected one of {names}; other names go into `hints`")
    return Scope(**fields)


def _scoped(value: Any, path: str) -> Scoped:
    scoped = value if isinstance(value, Scoped) else Scoped(value)
    content = cast(Any, scoped.value)
    if isinstance(content, bool) or not isinstance(content, str | int | tuple | list):
        raise invalid(path, f"expected text, a whole number or a list of texts, got `{type(content).__name__}`")
    if isinstance(content, tuple | list):
        content = tuple(_text(item, path) for item in listed(content, path, MAX_ENTRIES["scope.regions"]))
    elif isinstance(content, str):
        content = _text(content, path)
    else:
        content = cast(int, _plain(content, path))
    if scoped.provenance not in ("asserted", "established"):
        raise invalid(path, f"expected `asserted` or `established`, got {shown(scoped.provenance)}")
    return Scoped(content, scoped.provenance, _optional(scoped.by, path))


def _requested(ask: Ask) -> Requested:
    resources: dict[str, Quantity] = {}
    defaults = mapped(ask.client_defaults, "client_defaults")
    for name, value in mapped(ask.requested, "requested", MAX_ENTRIES["requested"]).items():
        if value is None:
            continue
        quantity = parse_quantity(name, value, field=f"requested.{brief(name)}")
        default = defaults.get(name)
        if default is not None and quantity == parse_quantity(name, default, field=f"client_defaults.{name}"):
            quantity = msgspec.structs.replace(quantity, provenance="client_default")
        resources[name] = quantity
    constraints: dict[str, Constraint] = {}
    for name, value in mapped(ask.constraints, "constraints", MAX_ENTRIES["constraints"]).items():
        if value is None:
            continue
        plain = bounded(value, f"constraints.{_key(name, 'constraints')}")
        default = defaults.get(name)
        same = default is not None and _same(bounded(default, f"client_defaults.{name}"), plain)
        constraints[name] = Constraint(_freeze(plain), "client_default" if same else "asserted")
    return Requested(resources, constraints)


def _correlation(ask: Ask, id: str, created_at: str) -> Correlation:
    if ask.idempotency_key == "":
        raise InvalidField("correlation.idempotency_key", "expected a key, got an empty one; leave it out for none")
    given = _optional(ask.traceparent, "correlation.traceparent")
    traceparent = given if given and _TRACEPARENT.fullmatch(given) else None
    return Correlation(
        id=id,
        schema_version=SCHEMA_VERSION,
        created_at=created_at,
        request_id=_optional(ask.request_id, "correlation.request_id"),
        traceparent=traceparent,
        tracestate=_optional(ask.tracestate, "correlation.tracestate") if traceparent else None,
        idempotency_key=_optional(ask.idempotency_key, "correlation.idempotency_key", limit=255),
        part_of=_optional(ask.part_of, "correlation.part_of"),
        runs_on=_optional(ask.runs_on, "correlation.runs_on"),
        supersedes=_optional(ask.supersedes, "correlation.supersedes"),
        facets={
            _key(name, "facets"): _facet(name, facet)
            for name, facet in mapped(ask.facets, "facets", MAX_ENTRIES["facets"]).items()
        },
    )


def _facet(name: str, facet: Any) -> Facet:
    path = f"facets.{name}"
    producer, schema, data = group(facet, 3, path)
    # The digest is of the text without credentials: a digest of a short secret could be guessed.
    text = _encoded(data, path).decode()
    return Facet(
        _text(producer, path),
        credentials.cut_text(text, MAX_VALUE_BYTES),
        sha256(text.encode()),
        _optional(schema, path),
    )


def key_digest(subject: Subject, operation: str, key: str) -> str:
    """An idempotency key in its scope. Of the key as it came: the sealed field holds only a marker of a credential."""
    return sha256(canonical([subject.tenant, subject.type, subject.id, operation, key]))


def bounded(value: Any, path: str) -> Any:
    """Plain JSON data as it may be sealed or recorded: no floats, ASCII keys, bounded depth and size.

    Credentials are replaced by markers. A float is kept as its text. What is too large or too deep is replaced by
    ``{"cut": {bytes, sha256}}``, with a marker in it when a credential was in what was cut.
    """
    plain = credentials.redact(_plain(value, path), path=path, found=lambda _: None)
    encoded = canonical(plain)
    return plain if len(encoded) <= MAX_VALUE_BYTES else _cut(encoded)


def _cut(encoded: bytes) -> dict[str, Any]:
    """What stands for a value that is too large or too deep: its size and its digest, without credentials."""
    said = {"bytes": len(encoded), "sha256": sha256(encoded)}
    marked = credentials.contains(encoded.decode())
    return {"cut": said | {"credential": credentials.marker("cut")} if marked else said}


def _encoded(value: Any, path: str) -> bytes:
    """Any data as JSON text without credentials."""
    try:
        plain = msgspec.to_builtins(value, str_keys=True)
        return canonical(credentials.redact(plain, path=path, found=lambda _: None))
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(path, f"expected JSON data: {brief(str(error), 200)}") from error


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, path)
    if isinstance(value, int):
        # Beyond 2^53 a JSON number is not the same everywhere; its text is.
        return value if abs(value) < 2**53 else str(value)
    if isinstance(value, float):
        return repr(value)
    if depth >= MAX_DEPTH:
        return _cut(_encoded(value, path))
    if isinstance(value, Mapping):
        return {_key(key, path): _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, path, depth + 1) for item in value]
    raise invalid(path, f"expected JSON data, got `{type(value).__name__}`")


def _same(left: Any, right: Any) -> bool:
    # As JSON, because True == 1 in Python; a client that sends `false` did not send `0`.
    return canonical(left) == canonical(right)


def _key(name: Any, path: str) -> str:
    if not isinstance(name, str) or not _KEY.fullmatch(name):
        raise invalid(path, f"expected a name of up to 128 letters, digits and `_.:/-`, got {shown(name)}")
    return name

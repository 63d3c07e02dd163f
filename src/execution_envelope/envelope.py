"""The envelope: five field families, sealed once, with a canonical form and a digest.

`Ask` is what an adapter writes; `seal` turns it into an `Envelope`, the record that never changes afterwards.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Literal, NoReturn, TypeAlias, cast, get_args

import msgspec

from execution_envelope import credentials
from execution_envelope.credentials import brief, group, invalid, listed, mapped, shown
from execution_envelope.errors import InvalidField, Unidentified
from execution_envelope.resources import Provenance, Quantity, parse_quantity, remembered
from execution_envelope.values import MAX_DEPTH as MAX_DEPTH
from execution_envelope.values import MAX_VALUE_BYTES as MAX_VALUE_BYTES
from execution_envelope.values import Texts, is_json, json_text, same, simple, whole
from execution_envelope.values import bounded as bounded
from execution_envelope.values import canonical as canonical
from execution_envelope.values import key as _key
from execution_envelope.values import optional as _optional
from execution_envelope.values import sha256 as sha256
from execution_envelope.values import text as _text
from execution_envelope.values import word as _word

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
#: How many paths of removed credentials one envelope lists; the last one then says how many more there were.
MAX_REDACTED: Final = 100

#: What a path in `Ask.secrets` starts with that is not of the body alone.
_FAMILIES: Final = ("constraints.", "facets.", "scope.hints.")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class _Sealed(dict[str, Any]):
    """A mapping of the sealed part: readable as a dict, refuses every change."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the sealed part of an envelope does not change; record an event instead")

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse


class _Struct(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Frozen all the way down, also after a round trip through JSON."""


class _Holder(_Struct, frozen=True):
    """One with fields, named in `_holds`, that may be given a dict or a list."""

    _holds: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for name in self._holds:
            value = getattr(self, name)
            if type(value) in (dict, list):
                msgspec.structs.force_setattr(self, name, _freeze(value))


class _OneValue(_Struct, frozen=True):
    """One whose `value` may be given as a dict or a list. There are many."""

    value: Any

    def __post_init__(self) -> None:
        if type(self.value) in (dict, list):
            msgspec.structs.force_setattr(self, "value", _freeze(self.value))


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


class Identity(_Holder, frozen=True):
    """Who asked. `delegation` says who acts for whom, outermost first; the subject is the one acting."""

    _holds = ("roles", "delegation")
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


class Scoped(_OneValue, frozen=True):
    """A scope value and where it comes from: the caller asserted it, or the backend established it, and by what."""

    value: str | int | tuple[str, ...]
    provenance: Literal["asserted", "established"] = "asserted"
    by: str | None = None


class Scope(_Holder, frozen=True):
    """Under which policy-relevant scope. `hints` are governance hints, open names."""

    _holds = ("hints",)
    project: Scoped | None = None
    workroom: Scoped | None = None
    environment: Scoped | None = None
    purpose: Scoped | None = None
    classification: Scoped | None = None
    regions: Scoped | None = None
    priority: Scoped | None = None
    hints: Mapping[str, Scoped] = {}


class Constraint(_OneValue, frozen=True):
    """A demand that is not an amount: engine, device, region. Open names, JSON values without floats."""

    value: Any
    provenance: Provenance = "asserted"


class Requested(_Holder, frozen=True):
    """Which resources, as the caller wrote them, before defaults and estimates."""

    _holds = ("resources", "constraints")
    resources: Mapping[str, Quantity] = {}
    constraints: Mapping[str, Constraint] = {}


class Facet(_Struct, frozen=True):
    """An extension: who produced it, its schema, its JSON text (cut when large), the digest of the whole."""

    producer: str
    text: str
    sha256: str
    schema: str | None = None


class Correlation(_Holder, frozen=True):
    """How it ties together. `id` is a UUIDv7, `created_at` RFC 3339 in UTC with microseconds."""

    _holds = ("facets",)
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


_decoder: Final = msgspec.json.Decoder(Envelope)
_NOTHING: Final = _Sealed()
_SCOPES: Final = frozenset(Scope.__struct_fields__)


def decode(body: bytes) -> Envelope:
    """Read an envelope back from its canonical bytes. Raises `msgspec.ValidationError` or `DecodeError`."""
    return _decoder.decode(body)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds: of fixed width, so that text order is time order."""
    if type(moment) is datetime and moment.tzinfo is UTC and moment.microsecond:
        return cast(str, msgspec.to_builtins(moment))  # the same ten times as fast; it leaves out a fraction of zero
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"


def seal(ask: Ask, *, id: str, now: datetime) -> SealedEnvelope:
    """Validate, redact, freeze and digest an ask.

    Raises `InvalidField` naming the first field that cannot be sealed, and `Unidentified` when no subject is named.
    """
    created_at = timestamp(now)
    texts = [id]
    envelope, redacted, secret = _read(ask, id, created_at, texts)
    if not credentials.clean(texts):
        envelope, redacted, secret = _read(ask, id, created_at, None)
        plain = credentials.redact(msgspec.to_builtins(envelope), path="", found=lambda path: redacted.append(path[1:]))
        envelope = msgspec.convert(plain, Envelope)
    body, same_request = _encoded(envelope)
    key = None
    if ask.subject is not None and ask.idempotency_key is not None:
        key = key_digest(ask.subject, ask.operation, ask.idempotency_key)
    digest, request_digest = sha256(body), sha256(same_request)
    if not redacted and not secret:
        return SealedEnvelope(envelope, body, digest, request_digest, key, ())
    removed = set(credentials.strings(secret))
    if redacted:
        removed.update(credentials.literals([ask.body, ask.constraints]))
    literals = frozenset(text for text in removed if len(text) >= credentials.MIN_LITERAL)
    return SealedEnvelope(envelope, body, digest, request_digest, key, _paths(redacted), literals)


def _read(ask: Ask, id: str, created_at: str, texts: Texts) -> tuple[Envelope, list[str], list[Any]]:
    """The envelope, the paths in the body at which something was removed, and what was removed because of its name."""
    redacted: list[str] = []
    secret: list[Any] = []
    ask = _without_named(ask, secret)
    envelope = Envelope(
        _identity(ask.subject, texts),
        _execution(ask, redacted, secret, texts),
        _scope(ask.scope, texts),
        _requested(ask, texts),
        _correlation(ask, id, created_at, texts),
    )
    return envelope, redacted, secret


def _encoded(envelope: Envelope) -> tuple[bytes, bytes]:
    """The canonical bytes of the envelope, and of what makes a request the same, each family encoded once."""
    try:
        execution, scope = canonical(envelope.execution), canonical(envelope.scope)
        identity, requested = canonical(envelope.identity), canonical(envelope.requested)
        correlation = canonical(envelope.correlation)
    except UnicodeEncodeError as error:
        raise InvalidField("ask", "expected text in valid Unicode, got a lone surrogate") from error
    return (
        b'{"correlation":%b,"execution":%b,"identity":%b,"requested":%b,"scope":%b}'
        % (correlation, execution, identity, requested, scope)
    ), b"[%b,%b,%b]" % (execution, scope, requested)


def _without_named(ask: Ask, secret: list[Any]) -> Ask:
    """The ask without what `secrets` names in its constraints, facets and hints; that goes into `secret`."""
    if ask.secrets == ():
        return ask
    fields = [name for name in listed(ask.secrets, "secrets") if _text(name, "secrets", None).startswith(_FAMILIES)]
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


def _identity(subject: Subject | None, texts: Texts) -> Identity:
    if subject is None:
        raise Unidentified("expected a subject, got none: name who asks in `Ask.subject` or by `identify`")
    if not isinstance(subject, Subject):
        raise invalid("identity.subject", f"expected a Subject, got {shown(subject)}")
    pairs = listed(subject.delegation, "identity.delegation", MAX_ENTRIES["delegation"])
    party = Party(_word(subject.type, "identity.subject.type", texts), _text(subject.id, "identity.subject.id", texts))
    tenant = _optional(subject.tenant, "identity.tenant", texts)
    roles = [
        _text(role, "identity.roles", texts) for role in listed(subject.roles, "identity.roles", MAX_ENTRIES["roles"])
    ]
    delegation = [_party(pair, texts) for pair in pairs]
    authentication = None
    if subject.method is not None:
        authentication = Authentication(
            _word(subject.method, "identity.authentication.method", texts),
            _optional(subject.issuer, "identity.authentication.issuer", texts),
            _optional(subject.session, "identity.authentication.session", texts),
        )
    return Identity(party, tenant, tuple(roles), tuple(delegation), authentication)


def _party(pair: Any, texts: Texts) -> Party:
    kind, name = group(pair, 2, "identity.delegation")
    return Party(_text(kind, "identity.delegation", texts), _text(name, "identity.delegation", texts))


def _execution(ask: Ask, redacted: list[str], secret: list[Any], texts: Texts) -> Execution:
    if ask.kind not in KINDS:
        raise InvalidField("execution.kind", f"expected one of {', '.join(KINDS)}, got {shown(ask.kind)}")
    if not isinstance(ask.target, Target):
        raise InvalidField("execution.target", f"expected a Target, got {shown(ask.target)}")

    def take(path: str, value: Any) -> None:
        redacted.append(f"request.{path}")
        secret.append(value)

    body = ask.body
    if ask.secrets != ():
        body = credentials.remove_fields(body, listed(ask.secrets, "secrets"), found=take)
    request = None
    if ask.schema is not None:
        try:
            if texts is None or not is_json(body, texts):
                body = credentials.redact(body, path="request", found=redacted.append)
            request = SourceRequest(_word(ask.schema, "execution.request.schema", texts), sha256(canonical(body)))
        except (TypeError, UnicodeEncodeError, RecursionError) as error:
            raise InvalidField("execution.request", f"expected a JSON body: {brief(str(error), 200)}") from error
    target = Target(
        _word(ask.target.type, "execution.target.type", texts),
        _text(ask.target.id, "execution.target.id", texts),
        _optional(ask.target.version, "execution.target.version", texts),
    )
    operation = _word(ask.operation, "execution.operation", texts)
    entrypoint = None if ask.entrypoint is None else _word(ask.entrypoint, "execution.entrypoint", texts)
    return Execution(cast(Kind, ask.kind), operation, target, entrypoint, request)


def _scope(values: Mapping[str, Any], texts: Texts) -> Scope:
    fields: dict[str, Any] = {"hints": _NOTHING}
    for name, value in mapped(values, "scope").items():
        if value is None:
            continue
        if name == "hints":
            fields["hints"] = _Sealed(
                {
                    _key(hint, "scope.hints", texts): _scoped(item, "scope.hints.", hint, texts)
                    for hint, item in mapped(value, "scope.hints", MAX_ENTRIES["scope.hints"]).items()
                    if item is not None
                }
            )
        elif name in _SCOPES:
            fields[name] = scoped = _scoped(value, "scope.", name, texts)
            if name == "regions" and isinstance(scoped.value, str):
                raise InvalidField("scope.regions", f"expected a list of texts, got {shown(scoped.value)}")
        else:
            names = ", ".join(Scope.__struct_fields__)
            raise invalid(f"scope.{brief(name)}", f"expected one of {names}; other names go into `hints`")
    return Scope(**fields)


def _scoped(value: Any, family: str, name: str, texts: Texts) -> Scoped:
    if texts is not None and type(value) is str and simple(value, texts):
        return Scoped(value)
    path = f"{family}{name}"
    scoped = value if isinstance(value, Scoped) else Scoped(value)
    content = cast(Any, scoped.value)
    if isinstance(content, str):
        content = _text(content, path, texts)
    elif isinstance(content, (tuple, list)):
        content = tuple([_text(item, path, texts) for item in listed(content, path, MAX_ENTRIES["scope.regions"])])
    elif isinstance(content, int) and not isinstance(content, bool):
        content = whole(content)
    else:
        raise invalid(path, f"expected text, a whole number or a list of texts, got `{type(content).__name__}`")
    if scoped.provenance not in ("asserted", "established"):
        raise invalid(path, f"expected `asserted` or `established`, got {shown(scoped.provenance)}")
    return Scoped(content, scoped.provenance, _optional(scoped.by, path, texts))


def _requested(ask: Ask, texts: Texts) -> Requested:
    resources: dict[str, Quantity] = {}
    defaults = mapped(ask.client_defaults, "client_defaults")
    for name, value in mapped(ask.requested, "requested", MAX_ENTRIES["requested"]).items():
        if value is None:
            continue
        quantity = remembered(name, value) or parse_quantity(name, value, field=f"requested.{brief(name)}")
        default = defaults.get(name)
        if default is not None:
            usual = remembered(name, default) or parse_quantity(name, default, field=f"client_defaults.{name}")
            if quantity == usual:
                quantity = Quantity(quantity.amount, quantity.floor, quantity.ceiling, quantity.per, "client_default")
        resources[name] = quantity
    constraints: dict[str, Constraint] = {}
    for name, value in mapped(ask.constraints, "constraints", MAX_ENTRIES["constraints"]).items():
        if value is None:
            continue
        _key(name, "constraints", texts)
        plain = value if texts is not None and simple(value, texts) else bounded(value, f"constraints.{name}", texts)
        default = defaults.get(name)
        if default is None:
            constraints[name] = Constraint(plain)
            continue
        if texts is not None and simple(default):
            sent = type(default) is type(plain) and default == plain
        else:
            sent = same(bounded(default, f"client_defaults.{name}"), plain)
        constraints[name] = Constraint(plain, "client_default" if sent else "asserted")
    return Requested(_Sealed(resources), _Sealed(constraints))


def _correlation(ask: Ask, id: str, created_at: str, texts: Texts) -> Correlation:
    if ask.idempotency_key == "":
        raise InvalidField("correlation.idempotency_key", "expected a key, got an empty one; leave it out for none")
    given = None if ask.traceparent is None else _text(ask.traceparent, "correlation.traceparent", None)
    traceparent = given if given and _TRACEPARENT.fullmatch(given) else None
    return Correlation(
        id=id,
        schema_version=SCHEMA_VERSION,
        created_at=created_at,
        request_id=None if ask.request_id is None else _text(ask.request_id, "correlation.request_id", texts),
        traceparent=traceparent,
        tracestate=_optional(ask.tracestate, "correlation.tracestate", texts) if traceparent else None,
        idempotency_key=_optional(ask.idempotency_key, "correlation.idempotency_key", texts, limit=255),
        part_of=None if ask.part_of is None else _text(ask.part_of, "correlation.part_of", texts),
        runs_on=None if ask.runs_on is None else _text(ask.runs_on, "correlation.runs_on", texts),
        supersedes=None if ask.supersedes is None else _text(ask.supersedes, "correlation.supersedes", texts),
        facets=_Sealed(
            {
                _key(name, "facets", texts): _facet(name, facet, texts)
                for name, facet in mapped(ask.facets, "facets", MAX_ENTRIES["facets"]).items()
            }
        ),
    )


def _facet(name: str, facet: Any, texts: Texts) -> Facet:
    path = f"facets.{name}"
    producer, schema, data = group(facet, 3, path)
    # The digest is of the text without credentials: a digest of a short secret could be guessed.
    text = json_text(data, path, texts)
    return Facet(
        _text(producer, path, texts),
        credentials.cut_text(text, MAX_VALUE_BYTES),
        sha256(text.encode()),
        _optional(schema, path, texts),
    )


def key_digest(subject: Subject, operation: str, key: str) -> str:
    """An idempotency key in its scope. Of the key as it came: the sealed field holds only a marker of a credential."""
    return sha256(canonical([subject.tenant, subject.type, subject.id, operation, key]))

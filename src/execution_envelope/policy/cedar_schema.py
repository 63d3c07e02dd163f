"""The envelope as a Cedar schema, and one envelope as a Cedar request with its entities.

Drawn from the same families as `view`. Cedar is typed, so what may be anything there has one type here: hints and
constraints are tags, each a set of texts (a list has several, anything but text is its JSON); other scope values are
texts, regions a set of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final
from urllib.parse import quote

from execution_envelope.envelope import KINDS, Envelope, Party, Scope, Target
from execution_envelope.policy.view import Wanted, view
from execution_envelope.resources import VOCABULARY
from execution_envelope.values import canonical

#: What ends the name of the action that stands for all operations of a kind which were not named.
ANY: Final = ":any"

_SCOPE: Final = tuple(name for name in Scope.__struct_fields__ if name != "hints")
_ATTRIBUTES: Final = """\
type Amount = {
  stated: String,
  amount?: Long,
  floor?: Long,
  ceiling?: Long,
  most?: Long,
  per: String,
  provenance: String,
};

type Authentication = {
  method: String,
  issuer?: String,
  session?: String,
};

type Request = {
  schema: String,
  sha256: String,
};

entity Role;

entity Tenant;

entity Subject in [Role, Tenant] = {
  type: String,
  id: String,
  tenant?: String,
  roles: Set<String>,
  delegation: Set<String>,
  authentication?: Authentication,
};

entity Target = {
  type: String,
  id: String,
  version?: String,
};

entity Hints tags Set<String>;

entity Constraints tags Set<String>;
"""
_FAMILIES: Final = ("execution", "scope", "provenance", "requested", "correlation")
_CORRELATION: Final = ("request_id", "traceparent", "tracestate", "idempotency_key", "part_of", "runs_on", "supersedes")


def schema(operations: Mapping[str, Collection[str]] | None = None) -> str:
    """The text of the schema. `operations` adds, for each kind, those that policies name as actions."""
    resources = "".join(f"    {name}?: Amount,\n" for name in VOCABULARY)
    scope = "".join(f"    {name}?: {_type(name)},\n" for name in _SCOPE)
    provenance = "".join(f"    {name}?: String,\n" for name in _SCOPE)
    correlation = "".join(f"    {name}?: String,\n" for name in _CORRELATION)
    context = (
        "type Context = {\n"
        "  execution: {\n    kind: String,\n    operation: String,\n"
        "    entrypoint?: String,\n    request?: Request,\n  },\n"
        f"  scope: {{\n{scope}    hints: Hints,\n  }},\n"
        f"  provenance: {{\n{provenance}    hints: Hints,\n  }},\n"
        f"  requested: {{\n    resources: {{\n{_deeper(resources)}    }},\n    constraints: Constraints,\n  }},\n"
        f"  correlation: {{\n    id: String,\n    schema_version: String,\n    created_at: String,\n{correlation}"
        "    facets: Set<String>,\n  },\n};\n"
    )
    actions = []
    for kind in KINDS:
        actions.append(f"action {_text(kind)};\n")
        for operation in (f"{kind}{ANY}", *sorted((operations or {}).get(kind, ()))):
            actions.append(
                f"action {_text(operation)} in [Action::{_text(kind)}] appliesTo {{\n"
                "  principal: [Subject],\n  resource: [Target],\n  context: Context,\n};\n"
            )
    return "\n".join([_ATTRIBUTES, context, *actions])


def wanted(attributes: Collection[str]) -> Wanted:
    """What of the view policies read that name these attributes. Names are literal in Cedar, so nothing else is."""
    tree: dict[str, Any] = {family: None for family in _FAMILIES if family in attributes}
    if "requested" in tree:
        resources = {name: None for name in VOCABULARY if name in attributes}
        tree["requested"] = {"resources": resources, "constraints": {}}
    return tree


def request(envelope: Envelope, wanted: Wanted) -> dict[str, Any]:
    """The request: principal, action, resource, and the context as JSON text."""
    context = view(envelope, wanted)
    if "execution" in context:
        context["execution"] = {name: value for name, value in context["execution"].items() if name != "target"}
    if "scope" in context:
        scope = {name: _scope_value(name, value) for name, value in context["scope"].items() if name != "hints"}
        context["scope"] = scope | {"hints": _HINTS}
    if "provenance" in context:
        context["provenance"]["hints"] = _HINT_PROVENANCE
    if "requested" in context:
        context["requested"]["constraints"] = _CONSTRAINTS
    if "correlation" in context:
        context["correlation"]["facets"] = list(context["correlation"]["facets"])
    return {
        "principal": _uid("Subject", party_id(envelope.identity.subject)),
        "action": _uid("Action", envelope.execution.operation),
        "resource": _uid("Target", party_id(envelope.execution.target)),
        "context": canonical(context).decode(),
    }


def entities(envelope: Envelope, attributes: Collection[str]) -> str:
    """The entities of a request, as JSON text: subject, target, the operation in its kind, hints and constraints."""
    identity, execution, scope = envelope.identity, envelope.execution, envelope.scope
    subject: dict[str, Any] = {
        "type": identity.subject.type,
        "id": identity.subject.id,
        "roles": identity.roles,
        "delegation": [party_id(party) for party in identity.delegation],
    }
    parents = [_uid("Role", role) for role in dict.fromkeys(identity.roles)]
    if identity.tenant is not None:
        subject["tenant"] = identity.tenant
        parents.append(_uid("Tenant", identity.tenant))
    if identity.authentication is not None:
        subject["authentication"] = identity.authentication
    some: list[dict[str, Any]] = [
        {"uid": _uid("Subject", party_id(identity.subject)), "attrs": subject, "parents": parents},
        {"uid": _uid("Target", party_id(execution.target)), "attrs": execution.target, "parents": ()},
        {"uid": _uid("Action", execution.operation), "attrs": {}, "parents": (_uid("Action", execution.kind),)},
    ]
    if "hints" in attributes:
        some.append(_tagged(_HINTS, {name: _texts(hint.value) for name, hint in scope.hints.items()}))
        some.append(_tagged(_HINT_PROVENANCE, {name: [hint.provenance] for name, hint in scope.hints.items()}))
    if "constraints" in attributes:
        constraints = envelope.requested.constraints
        some.append(_tagged(_CONSTRAINTS, {name: _texts(one.value) for name, one in constraints.items()}))
    return canonical(some).decode()


def party_id(party: Party | Target) -> str:
    """``user:dana``: type and id, for which no other pair stands."""
    kind = party.type
    return f"{kind if kind.isidentifier() else quote(kind, safe='')}:{party.id}"


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, "id": name}


def _reference(kind: str, name: str) -> dict[str, dict[str, str]]:
    return {"__entity": _uid(kind, name)}


_HINTS: Final = _reference("Hints", "scope")
_HINT_PROVENANCE: Final = _reference("Hints", "provenance")
_CONSTRAINTS: Final = _reference("Constraints", "requested")


def _tagged(reference: Mapping[str, Any], tags: Mapping[str, Any]) -> dict[str, Any]:
    return {"uid": reference["__entity"], "attrs": {}, "parents": [], "tags": tags}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else (value,)
    return [one if isinstance(one, str) else canonical(one).decode() for one in values]


def _scope_value(name: str, value: Any) -> Any:
    if name == "regions":
        return _texts(value)
    return value if isinstance(value, str) else canonical(value).decode()


def _type(name: str) -> str:
    return "Set<String>" if name == "regions" else "String"


def _deeper(lines: str) -> str:
    return "".join(f"  {line}\n" for line in lines.splitlines())


def _text(value: str) -> str:
    # Cedar's escapes are those of Rust; of JSON's only these differ in what operations may hold.
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{{{ord(c):x}}}" for c in value)
    return f'"{escaped}"'

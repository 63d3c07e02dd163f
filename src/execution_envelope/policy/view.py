"""The envelope as policies see it: plain JSON data, one shape for all engines.

::

    identity     subject {type, id}, tenant, roles, delegation, authentication {method, issuer, session}
    execution    kind, operation, target {type, id, version}, entrypoint, request {schema, sha256}
    scope        project, workroom, environment, purpose, classification, regions, priority, hints {name: value}
    provenance   the same names as scope: `asserted` or `established`
    requested    resources {name: {amount, floor, ceiling, most, per, stated, provenance}}, constraints {name: value}
    correlation  as it is sealed

What is absent in the envelope is absent here; there is no null. Amounts are whole numbers in base units. A resource
whose amount is unknown or unlimited has no `amount`, and `stated` says which it is (else `amount`): so a comparison
that forgot about them is an error, never a pass. `most` is the total that it can come to, over all parts and up to the
ceiling; it is absent where that is not a number. Scope values are plain, without where they come from; that is in
`provenance`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from execution_envelope.budgets import worst_case
from execution_envelope.envelope import (
    Authentication,
    Correlation,
    Envelope,
    Execution,
    Identity,
    Party,
    Scope,
    Scoped,
    SourceRequest,
    Target,
)
from execution_envelope.resources import VOCABULARY, Quantity

#: Which part of the view is wanted: name -> part of that; None is all of it.
Wanted: TypeAlias = "Mapping[str, Wanted | None]"
#: What is where: name -> what is below; None for a value; `OPEN` for names that are not known beforehand.
Shape: TypeAlias = "Mapping[str, Shape | None]"
OPEN: Final[Shape] = {}

AMOUNT_FIELDS: Final = ("stated", "amount", "floor", "ceiling", "most", "per", "provenance")


def _fields(struct: type[msgspec.Struct], **below: Shape) -> Shape:
    return {name: below.get(name) for name in struct.__struct_fields__}


#: A name that nothing has: what is wanted of something that is only to be there.
NOTHING: Final = ""

#: Every name that a policy can read.
SHAPE: Final[Mapping[str, Shape]] = {
    "identity": _fields(Identity, subject=_fields(Party), authentication=_fields(Authentication)),
    "execution": _fields(Execution, target=_fields(Target), request=_fields(SourceRequest)),
    "scope": _fields(Scope, hints=OPEN),
    "provenance": _fields(Scope, hints=OPEN),
    "requested": {
        "resources": {name: dict.fromkeys(AMOUNT_FIELDS) for name in VOCABULARY},
        "constraints": OPEN,
    },
    "correlation": _fields(Correlation, facets=OPEN),
}


def view(envelope: Envelope, wanted: Wanted | None = None) -> dict[str, Any]:
    """The envelope as plain data; of it only what is wanted."""
    families = _EVERYTHING if wanted is None else wanted
    return {family: _FAMILIES[family](envelope, below) for family, below in families.items()}


_EVERYTHING: Final[Wanted] = dict.fromkeys(SHAPE)


def _plain(value: Any, wanted: Wanted | None) -> Any:
    if type(value) is tuple:
        return [item if type(item) is str else _plain(item, None) for item in value]
    if isinstance(value, msgspec.Struct):
        return _of_struct(value, wanted)
    if isinstance(value, Mapping):
        names: Iterable[str] = value if wanted is None else [name for name in wanted if name in value]
        return {name: _plain(value[name], None if wanted is None else wanted[name]) for name in names}
    return value


def _of_struct(struct: msgspec.Struct, wanted: Wanted | None) -> dict[str, Any]:
    plain = {}
    for name, below in (dict.fromkeys(struct.__struct_fields__) if wanted is None else wanted).items():
        value = getattr(struct, name, None)
        if value is not None:
            plain[name] = value if type(value) is str else _plain(value, below)
    return plain


def _scope(envelope: Envelope, wanted: Wanted | None) -> dict[str, Any]:
    return _of_scope(envelope.scope, wanted, "value")


def _provenance(envelope: Envelope, wanted: Wanted | None) -> dict[str, Any]:
    return _of_scope(envelope.scope, wanted, "provenance")


def _of_scope(scope: Scope, wanted: Wanted | None, part: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name in Scope.__struct_fields__ if wanted is None else wanted:
        scoped = getattr(scope, name, None)
        if type(scoped) is Scoped:
            value = getattr(scoped, part)
            plain[name] = value if type(value) is str else _plain(value, None)
        elif name == "hints":
            some: Iterable[str] = scope.hints if wanted is None or wanted[name] is None else wanted[name] or ()
            plain[name] = {hint: _plain(getattr(scope.hints[hint], part), None) for hint in some if hint in scope.hints}
    return plain


def _requested(envelope: Envelope, wanted: Wanted | None) -> dict[str, Any]:
    requested, plain = envelope.requested, dict[str, Any]()
    if wanted is None or "resources" in wanted:
        below = None if wanted is None else wanted["resources"]
        names: Iterable[str] = requested.resources if below is None else below
        resources = {}
        for name in names:
            quantity = requested.resources.get(name)
            if quantity is not None:
                resources[name] = _amounts(envelope, name, quantity, None if below is None else below[name])
        plain["resources"] = resources
    if wanted is None or "constraints" in wanted:
        below = None if wanted is None else wanted["constraints"]
        names = requested.constraints if below is None else below
        constraints = requested.constraints
        plain["constraints"] = {name: _plain(constraints[name].value, None) for name in names if name in constraints}
    return plain


def _amounts(envelope: Envelope, name: str, quantity: Quantity, wanted: Wanted | None) -> dict[str, Any]:
    amount = quantity.amount
    if wanted is not None and len(wanted) == 1 and "amount" in wanted:
        return {"amount": amount} if isinstance(amount, int) else {}
    plain: dict[str, Any] = {
        "per": quantity.per,
        "stated": "amount" if isinstance(amount, int) else amount,
        "provenance": quantity.provenance,
    }
    if isinstance(amount, int):
        plain["amount"] = amount
    if quantity.floor is not None:
        plain["floor"] = quantity.floor
    if quantity.ceiling is not None:
        plain["ceiling"] = quantity.ceiling
    if wanted is None or "most" in wanted:
        if quantity.per == "total":
            most = amount if quantity.ceiling is None else quantity.ceiling
        else:
            most = worst_case(envelope, {}).get(name, "unknown")
        if isinstance(most, int):
            plain["most"] = most
    return plain if wanted is None else {field: plain[field] for field in wanted if field in plain}


_FAMILIES: Final[Mapping[str, Any]] = {
    "identity": lambda envelope, wanted: _of_struct(envelope.identity, wanted),
    "execution": lambda envelope, wanted: _of_struct(envelope.execution, wanted),
    "scope": _scope,
    "provenance": _provenance,
    "requested": _requested,
    "correlation": lambda envelope, wanted: _of_struct(envelope.correlation, wanted),
}

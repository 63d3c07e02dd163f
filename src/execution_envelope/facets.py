"""Facets whose schema is known are validated before sealing; those of other schemas are kept as they are.

Needs the extra ``facets`` (`jsonschema`). A schema is never fetched: the host says which it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import jsonschema
import msgspec
import referencing
import referencing.exceptions
import referencing.jsonschema

from execution_envelope.credentials import brief, invalid
from execution_envelope.envelope import Envelope
from execution_envelope.errors import InvalidField

#: How much of what a validator says is repeated.
_MAX_SAID: Final = 200
_REFERS: Final = ("$ref", "$dynamicRef", "$recursiveRef")
#: What is under these is data, and no schema.
_DATA: Final = frozenset({"enum", "const", "default", "examples"})


class FacetSchemas:
    """``FacetSchemas({"https://example.com/carbon/1.json": {...}})``: JSON Schemas by the URL that facets name.

    Raises `InvalidField` at once for a schema that is none, or that refers to another document. Whoever writes a schema
    is trusted: a `pattern` that takes for ever on some texts blocks the process.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._validators = {url: _validator(url, schema) for url, schema in schemas.items()}

    def __call__(self, envelope: Envelope) -> None:
        """Raises `InvalidField` for the first facet that does not fit its schema, and for one that was cut."""
        for name, facet in envelope.correlation.facets.items():
            validator = self._validators.get(facet.schema or "")
            if validator is None:
                continue
            try:
                data = msgspec.json.decode(facet.text)
            except msgspec.DecodeError:
                raise invalid(f"facets.{name}", "expected data that can be validated, it is too large") from None
            try:
                error = jsonschema.exceptions.best_match(validator.iter_errors(data))
            except (RecursionError, referencing.exceptions.Unresolvable) as problem:
                # A schema that goes round in circles; what it refers to was resolved when it was taken.
                said = f"expected data that can be validated by its schema: {type(problem).__name__}"
                raise invalid(f"facets.{name}", said) from None
            if error is not None:
                where = "".join(f".{brief(str(part))}" for part in error.absolute_path)
                # The message would repeat the value, which may be long; the rule that it breaks says enough.
                expected = brief(f"{error.validator}: {msgspec.json.encode(error.validator_value).decode()}", _MAX_SAID)
                raise InvalidField(f"facets.{name}{where}", f"expected {expected} by its schema, got another value")


def _validator(url: str, schema: Mapping[str, Any]) -> Any:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise invalid(f"facets.{brief(url)}", f"expected a JSON Schema: {brief(error.message, _MAX_SAID)}") from None
    specification = referencing.jsonschema.specification_with(
        kind.META_SCHEMA.get("$id", kind.META_SCHEMA.get("id", "")), default=referencing.jsonschema.DRAFT202012
    )
    resolver = referencing.Registry().with_resource("", specification.create_resource(schema)).resolver()
    for ref in _references(schema):
        if not ref.startswith("#"):
            raise invalid(f"facets.{brief(url)}", f"expected a schema without other documents, got `{brief(ref)}`")
        try:
            resolver.lookup(ref)
        except referencing.exceptions.Unresolvable:
            raise invalid(
                f"facets.{brief(url)}", f"expected a reference that leads somewhere, got `{brief(ref)}`"
            ) from None
    return kind(schema)


def _references(node: Any) -> list[str]:
    if isinstance(node, Mapping):
        own = [value for name in _REFERS if isinstance(value := node.get(name), str)]
        return own + [ref for name, value in node.items() if name not in _DATA for ref in _references(value)]
    if isinstance(node, list | tuple):
        return [ref for value in node for ref in _references(value)]
    return []

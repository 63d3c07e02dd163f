"""The public contract of adapters finds out what does not keep it."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field

from execution_envelope import Ask, InvalidField
from execution_envelope.adapters import Context
from execution_envelope.adapters.declared import Always, Mapped
from execution_envelope.testing import AdapterContract
from execution_envelope.testing.fields import Fields, schema_of

JOB: dict[str, Any] = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "engine": {"enum": ["auto", "fast"]},
        "comment": {"type": "string"},
        "token": {"type": "string", "format": "password"},
        "options": {"type": "object", "additionalProperties": True},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/Part"}},
    },
    "$defs": {"Part": {"type": "object", "properties": {"size": {"type": "integer"}, "of": {"$ref": "#/$defs/Part"}}}},
}
SAMPLES = [
    {"model": "m", "engine": "auto"},
    {"model": "m", "limit": 3, "token": "t", "options": {"region": "eu"}, "parts": [{"size": 1}]},
]
GOOD = Mapped(
    kind="evaluation",
    operation="jobs.create",
    target="model",
    target_id="model",
    resources={"samples": "limit", "requests": Always(1)},
    constraints={"engine": "engine", "parts": "parts"},
    scope={"regions": "options.region"},
    client_defaults={"engine": "auto"},
    secrets=["token"],
    schema="example.Job/1",
    not_admitted=["comment", "options.*"],
)


def contract(adapter: Any, bare: Any = (SAMPLES[0], {"requests"}), **said: Any) -> AdapterContract:
    class Contract(AdapterContract):
        def make_adapter(self) -> Any:
            return adapter

        def make_schema(self) -> Any:
            return said.get("schema", JOB)

        def make_samples(self) -> Sequence[Any]:
            return SAMPLES

        def make_not_admitted(self) -> Collection[str]:
            listed: Collection[str] = said.get("listed", GOOD.not_admitted)
            return listed

        def make_bare(self) -> Any:
            return bare

    return Contract()


TESTS = [name for name in dir(AdapterContract) if name.startswith("test_")]


@pytest.mark.parametrize("test", TESTS)
def test_a_good_one_keeps_it(test: str) -> None:
    getattr(contract(GOOD), test)()


def but(change: Callable[[Any, Ask], Any]) -> Callable[[Any, Context], Any]:
    """The good adapter with something wrong."""

    def adapter(body: Any, context: Context) -> Any:
        return change(body, GOOD(body, context))

    return adapter


def mutating(body: Any, ask: Ask) -> Ask:
    body["limit"] = 5
    return ask


def telling(body: Any, ask: Ask) -> Ask:
    if body.get("token") not in (None, "t"):
        raise InvalidField("body.token", f"expected another token than {body['token']}")
    return ask


def first(body: Any, name: str) -> Any:
    value = body.get(name)
    return value[0] if isinstance(value, list) and value else None


TAGGED = {"properties": {"tags": {"type": "array", "items": {"type": "string"}}}}
LISTED = ["comment", "options.*", "*"]
OPEN = {
    **JOB,
    "additionalProperties": True,
    "properties": {k: v for k, v in JOB["properties"].items() if k not in ("engine", "parts")},
}


class Part(BaseModel):
    model_config = ConfigDict(alias_generator=lambda name: name.removeprefix("of_"), populate_by_name=True)
    of_size: int


class Named(BaseModel):
    limit: int | None = Field(None, validation_alias=AliasChoices("limit", "samples", AliasPath("deep", "limit")))
    by: str | None = Field(None, alias="engine")
    parts: list[Part] = []


BARE = dataclasses.replace(GOOD, scope={})
count = itertools.count()
replace = dataclasses.replace
BROKEN: dict[str, tuple[str, AdapterContract, str]] = {
    "a field is lost": (
        "test_every_field_is_mapped_or_listed",
        contract(replace(GOOD, resources={})),
        "these are not: limit$",
    ),
    "a field of an open object is lost": (
        "test_every_field_is_mapped_or_listed",
        contract(replace(GOOD, scope={}), listed=["comment"]),
        r"these are not: options\.region, options\.\*$",
    ),
    "a field of the items of a list is lost": (
        "test_every_field_is_mapped_or_listed",
        contract(replace(GOOD, constraints={"engine": "engine"})),
        r"these are not: parts\.\*\.size, parts\.\*\.of$",
    ),
    "a field of a later item is lost": (
        "test_every_field_is_mapped_or_listed",
        contract(but(lambda body, ask: replace(ask, constraints={**ask.constraints, "parts": first(body, "parts")}))),
        r"these are not: parts\.\*\.size of a later item, parts\.\*\.of of a later item$",
    ),
    "later texts of a list are lost": (
        "test_every_field_is_mapped_or_listed",
        contract(but(lambda body, ask: replace(ask, facets={"a": ("p", None, first(body, "tags"))})), schema=TAGGED),
        "these are not: tags of a later item$",
    ),
    "a second name is lost": (
        "test_every_field_is_mapped_or_listed",
        contract(GOOD, schema=Named),
        r"these are not: samples, deep\.limit$",
    ),
    "a name of an open body is lost": (
        "test_every_field_is_mapped_or_listed",
        contract(GOOD, schema=OPEN),
        r"these are not: \*$",
    ),
    "a known name is lost beside the others of an open body": (
        "test_every_field_is_mapped_or_listed",
        contract(GOOD, schema=OPEN | {"properties": {**JOB["properties"], "gpus": {"type": "integer"}}}, listed=LISTED),
        r"these are not: gpus$",
    ),
    "the others of an open body change the ask": (
        "test_what_is_listed_changes_nothing",
        contract(but(lambda body, ask: replace(ask, operation=f"of {len(body)}")), schema=OPEN, listed=["*"]),
        r"these do: \*$",
    ),
    "no value is taken": (
        "test_every_field_is_mapped_or_listed",
        contract(replace(GOOD, resources={"samples": "most"}), schema={"properties": {"most": {"enum": [-1]}}}),
        "expected a value for `most` that is taken",
    ),
    "a listed field is not one": (
        "test_what_is_listed_changes_nothing",
        contract(GOOD, listed=["comment", "options.*", "gone"]),
        "these are none: gone$",
    ),
    "a listed field changes the ask": (
        "test_what_is_listed_changes_nothing",
        contract(GOOD, listed=["comment", "options", "limit"]),
        "these do: limit, options$",
    ),
    "names that are listed change the ask": (
        "test_what_is_listed_changes_nothing",
        contract(but(lambda body, ask: replace(ask, constraints={"n": len(body.get("options") or ())}))),
        r"these do: options\.\*$",
    ),
    "it remembers": (
        "test_it_is_pure",
        contract(but(lambda body, ask: replace(ask, request_id=str(next(count))))),
        "expected the same ask",
    ),
    "it changes the body": ("test_it_is_pure", contract(but(mutating)), "expected the body as it was"),
    "it answers something else": ("test_it_is_pure", contract(but(lambda body, ask: None)), "expected an Ask"),
    "a default is forgotten": (
        "test_client_defaults_are_reported_as_such",
        contract(replace(GOOD, client_defaults={})),
        "expected a request without wishes to ask for `requests`, it asks for `engine`, `requests`",
    ),
    "nobody says what a client sends by itself": (
        "test_client_defaults_are_reported_as_such",
        contract(GOOD, bare=None),
        "expected `make_bare`",
    ),
    "a secret is not named": (
        "test_secrets_reach_neither_the_envelope_nor_its_digest",
        contract(replace(GOOD, secrets=())),
        "expected the adapter to name these secrets: `token`",
    ),
    "a secret is shown elsewhere": (
        "test_secrets_reach_neither_the_envelope_nor_its_digest",
        contract(but(lambda body, ask: replace(ask, constraints={"token": body.get("token")}))),
        "expected `token` to be nowhere in the envelope",
    ),
    "a secret is in the digest": (
        "test_secrets_reach_neither_the_envelope_nor_its_digest",
        contract(but(lambda body, ask: replace(ask, body=[body]))),
        "expected `token` not to be in the digest|nowhere",
    ),
    "a secret is in a message": (
        "test_secrets_reach_neither_the_envelope_nor_its_digest",
        contract(but(telling)),
        "expected no message with the value of `token`",
    ),
    "a secret has another shape": (
        "test_secrets_reach_neither_the_envelope_nor_its_digest",
        contract(lambda body, context: replace(BARE(body, context), secrets=["token", "options.*"])),
        "expected `options` not to be in the digest",
    ),
    "it fails for odd JSON": (
        "test_whatever_arrives_is_sealed_or_refused",
        contract(lambda body, context: GOOD({**body, "model": body["model"]}, context)),
        "expected an ask or `InvalidField`, got `(KeyError|TypeError)`",
    ),
    "it fails for one value of one field": (
        "test_whatever_arrives_is_sealed_or_refused",
        contract(but(lambda body, ask: ask if "comment" not in body or len(body["comment"]) else None)),
        "expected an ask or `InvalidField`",
    ),
}


def test_a_model_has_every_name_by_which_a_field_is_taken() -> None:
    class Deep(BaseModel):
        only: int = Field(0, validation_alias=AliasPath("at", 0, "place"))
        named: Named

    found = Fields(schema_of(Deep), [], ()).values
    inner = ["limit", "samples", "deep.limit", "engine", "parts.*.size", "parts.*.of_size"]
    assert found.keys() == {"at.*.place", *(f"named.{name}" for name in inner)}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_is_found_out(case: str) -> None:
    test, broken, message = BROKEN[case]
    with pytest.raises(AssertionError, match=message):
        getattr(broken, test)()


@pytest.mark.parametrize("case", [case for case in BROKEN if case.startswith("it fails")])
def test_a_broken_one_is_found_out_without_hypothesis(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    test_a_broken_one_is_found_out(case)


def test_a_good_one_keeps_it_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    contract(GOOD).test_whatever_arrives_is_sealed_or_refused()


def test_one_that_fails_for_one_of_the_values_that_a_schema_names_is_found_out() -> None:
    known = {None: {}, "auto": {}, "fast": {"gpu": 1}}
    schema = {**JOB, "properties": {**JOB["properties"], "engine": {"enum": ["auto", "fast", "faster"]}}}
    broken = contract(but(lambda body, ask: replace(ask, requested=known[body.get("engine")])), schema=schema)
    with pytest.raises(KeyError, match="faster"):
        broken.test_every_field_is_mapped_or_listed()


def test_what_was_found_of_one_schema_is_not_said_of_another() -> None:
    said: dict[str, Any] = {"schema": {"properties": {"limit": {"type": "integer"}, "engine": {}}}}

    class Several(type(contract(GOOD))):  # type: ignore[misc]
        def make_schema(self) -> Any:
            return said["schema"]

    Several().test_every_field_is_mapped_or_listed()
    said["schema"] = {"properties": {"limit": {"type": "integer"}, "nobody": {"type": "string"}}}
    with pytest.raises(AssertionError, match=r"these are not: nobody$"):
        Several().test_every_field_is_mapped_or_listed()

"""The contract that every adapter keeps, as tests to inherit."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final

import msgspec

from execution_envelope.adapters import Context, Describe
from execution_envelope.envelope import Ask, Constraint, SealedEnvelope, Subject, canonical, seal
from execution_envelope.errors import InvalidField
from execution_envelope.resources import Quantity
from execution_envelope.testing.fields import EDGES, LISTS, Fields, planted, schema_of, seeded, variants
from execution_envelope.testing.kit import START

#: What is put where a secret may stand, to look for it afterwards.
_CANARIES: Final = ("canary-one-5d1f", "canary-two-77ab")
_MAX_MESSAGE: Final = 2000


class AdapterContract:
    """What a seam expects of every adapter, as tests: inherit from it, and say what its requests look like.

    ::

        class TestNightly(AdapterContract):
            def make_adapter(self):
                return describe_nightly

            def make_schema(self):
                return NightlyRequest  # a pydantic model, or the JSON schema of the body

            def make_samples(self):
                return [{"model": "m", "limit": 10}]

    Every field of the schema changes the ask, or is a secret, or is listed as not part of admission. A field is tried
    on every sample, with the values that other samples have for it and with some of its type; by each of its names
    where a model has several; in the first item of a list, and in the last of two. That it changes the ask does not
    say that the amount is right.
    """

    #: What a class says of its requests, and what was found of their fields.
    _found: ClassVar[tuple[tuple[Any, ...], Sequence[tuple[str, bool | None, bool]]]]

    def make_adapter(self) -> Describe:
        """The adapter."""
        raise NotImplementedError

    def make_schema(self) -> Any:
        """The JSON schema of the body, or a pydantic model that has one."""
        raise NotImplementedError

    def make_samples(self) -> Sequence[Any]:
        """Bodies that are sealed, which together have every form that a request may take."""
        raise NotImplementedError

    def make_context(self) -> Context:
        """What the adapter may look at beside the body."""
        return Context("POST /", {}, {}, {}, None)

    def make_not_admitted(self) -> Collection[str]:
        """The fields that are not part of admission: a path with all beneath it, or ``path.*`` for the other names of
        an open object, of the body itself ``*``. Those of an adapter that is declared are known."""
        return getattr(self.make_adapter(), "not_admitted", ())

    def make_values(self) -> Mapping[str, Sequence[Any]]:
        """Values to try for fields whose type does not say what they may be: field -> two or more."""
        return {}

    def make_secrets(self) -> Collection[str]:
        """Fields that have to be taken out, beside those that the schema says are secret."""
        return ()

    def make_bare(self) -> tuple[Any, Collection[str]] | None:
        """The body that the client sends when its user asked for nothing more than they had to, and the names of
        resources and constraints which that really asks for. None for a client without defaults of its own."""
        return None

    def test_every_field_is_mapped_or_listed(self) -> None:
        listed = set(self.make_not_admitted())
        others = self._fields().others if "*" in listed else ()
        listed.discard("*")
        lost = []
        secrets = self._secrets()
        for path, changes, later in self._changes():
            if changes and later:
                continue
            if _covered(path, listed) or _covered(path, secrets) or path.split(".")[0] in others:
                continue
            assert changes is not None, f"expected a value for `{path}` that is taken, add some to `make_values`"
            lost.append(f"{path} of a later item" if changes else path)
        assert not lost, (
            f"expected every field to be mapped, or listed as not part of admission, these are not: {', '.join(lost)}"
        )

    def test_what_is_listed_changes_nothing(self) -> None:
        listed = set(self.make_not_admitted())
        fields = self._fields()
        known = {
            *fields.values,
            *(".".join(p.split(".")[:n]) for p in fields.values for n in range(1, p.count(".") + 1)),
        }
        stale = sorted(listed - known)
        assert not stale, f"expected only fields of the schema to be listed, these are none: {', '.join(stale)}"
        exact = {path for path in listed if path.split(".")[-1] != "*"}
        wrong = [path for path, changes in self.changes() if changes and (path in listed or _covered(path, exact))]
        assert not wrong, f"expected a listed field to change nothing in the ask, these do: {', '.join(wrong)}"

    def test_it_is_pure(self) -> None:
        adapter, context = self.make_adapter(), self._context()
        for sample in self.make_samples():
            given = copy.deepcopy(sample)
            first, second = adapter(given, context), adapter(copy.deepcopy(sample), context)
            assert isinstance(first, Ask), f"expected an Ask, got `{type(first).__name__}`"
            assert first == second, "expected the same ask of the same request"
            assert _same(given, sample), "expected the body as it was"
            _sealed(first)

    def test_client_defaults_are_reported_as_such(self) -> None:
        bare = self.make_bare()
        if bare is None:
            named = [name for each in self.make_samples() for name in self._ask(each).client_defaults]
            assert not named, "expected `make_bare`, because the adapter names client defaults"
            return
        body, asked = bare
        requested = _sealed(self._ask(body)).envelope.requested
        found: dict[str, Quantity | Constraint] = {**requested.resources, **requested.constraints}
        really = {name for name, value in found.items() if value.provenance == "asserted"}
        assert really == set(asked), (
            f"expected a request without wishes to ask for {_names(asked)}, it asks for {_names(really)}"
        )
        assert len(found) > len(really), "expected some client default in a request without wishes"

    def test_secrets_reach_neither_the_envelope_nor_its_digest(self) -> None:
        secrets = self._secrets()
        missing = {*self._fields().secret, *self.make_secrets()}
        missing = {path for path in missing if not _covered(path, secrets)}
        assert not missing, f"expected the adapter to name these secrets: {_names(missing)}"
        for path in sorted(secrets):
            taken = 0
            for body in self.make_samples():
                taken += self._without_canary(body, path)
                if path.endswith(".*"):
                    # A scalar where an object should be would be in the digest, which can be guessed.
                    self._without_canary(body, path.removesuffix(".*"))
            assert taken, f"expected a sample in which `{path}` may stand"

    def test_whatever_arrives_is_sealed_or_refused(self) -> None:
        samples, paths = self.make_samples(), sorted(self._fields().values)
        deep, deepest = _deep(300), _deep(20_000)
        holding = {name: sample for sample in samples if isinstance(sample, dict) for name in sample}
        for name, body in holding.items():
            for value in (deepest, {name: deep}):
                self._sealed_or_refused({**body, name: value})
        for value in EDGES:
            self._sealed_or_refused(value)
        if importlib.util.find_spec("hypothesis") is None:
            for body in seeded(samples, paths, 400):
                self._sealed_or_refused(body)
        else:
            self._fuzz(samples, paths)

    def _fuzz(self, samples: Sequence[Any], paths: Sequence[str]) -> None:
        from hypothesis import HealthCheck, given, settings
        from hypothesis import strategies as st

        scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(EDGES)
        names = st.text(max_size=8)
        if paths:
            names |= st.sampled_from(sorted({step for path in paths for step in path.split(".")}))
        json = st.recursive(
            scalars,
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5),
            max_leaves=12,
        )
        changes = st.lists(st.tuples(st.sampled_from(paths), json), max_size=3) if paths else st.just([])

        @settings(
            max_examples=150,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(json, st.sampled_from(samples), changes)
        def whatever(value: Any, body: Any, changed: Sequence[tuple[str, Any]]) -> None:
            self._sealed_or_refused(value)
            for path, inner in changed:
                body = planted(body, path, inner) or body
            self._sealed_or_refused(body)

        whatever()

    def _context(self) -> Context:
        made = self.make_context()
        path_params, query, headers = (
            MappingProxyType(dict(part)) for part in (made.path_params, made.query, made.headers)
        )
        return Context(made.surface, path_params, query, headers, made.subject)

    def _ask(self, body: Any) -> Ask:
        return self.make_adapter()(copy.deepcopy(body), self._context())

    def _fields(self) -> Fields:
        schema = self.make_schema()
        plain = schema if isinstance(schema, Mapping) else schema_of(schema)
        fields = Fields(plain, self.make_samples(), self.make_not_admitted())
        for path, values in self.make_values().items():
            fields.values.setdefault(path, []).extend(values)
        return fields

    def _secrets(self) -> set[str]:
        return {path for sample in self.make_samples() for path in self._ask(sample).secrets}

    def changes(self) -> Iterator[tuple[str, bool | None]]:
        """Each field of the schema, and whether it changes the ask; None where no value of it was taken."""
        for path, changes, _ in self._changes():
            yield path, changes

    def _changes(self) -> Sequence[tuple[str, bool | None, bool]]:
        """The same, and whether more than the first item of a list does, which it may where no list is taken."""
        # It takes seconds where there are many fields, and two tests ask for it, each with an object of its own.
        own = type(self)
        of = (
            *(self.make_adapter(), self.make_schema(), self.make_samples(), self.make_context()),
            *(self.make_not_admitted(), self.make_values()),
        )
        if "_found" not in vars(own) or own._found[0] != of:
            own._found = of, list(self._looked_for())
        return own._found[1]

    def _looked_for(self) -> Iterator[tuple[str, bool | None, bool]]:
        self._known: dict[str, bytes | None] = {}
        for path, values in self._fields().values.items():
            changes, taken = self._tried(path, values)
            later, of_two = self._tried(path, values, last=True)
            if any(isinstance(value, list) for value in values):
                lists = [self._later(sample, path, same) for sample in self.make_samples() for same in LISTS]
                later |= True in lists
                of_two += len(set(lists) - {None})
            yield path, changes if changes or taken else None, later or not of_two

    def _later(self, sample: Any, path: str, lists: Sequence[Any]) -> bool | None:
        """Whether lists that begin with the same item are different asks; None when no two are taken."""
        said = [self._said(body) for has, body in variants(sample, path, lists, ()) if has]
        answers = [each for each in said if each is not None]
        return len(set(answers)) > 1 if len(answers) > 1 else None

    def _tried(self, path: str, values: Sequence[Any], *, last: bool = False) -> tuple[bool, int]:
        """Whether one of the samples is another ask with another of the values, and how many were taken."""
        samples = self.make_samples()
        taken = 0
        for sample in samples:
            said = [(has, self._said(body)) for has, body in variants(sample, path, values, samples, last=last)]
            taken += sum(has and answer is not None for has, answer in said)
            if len({answer for _, answer in said} - {None}) > 1:
                return True, taken
        return False, taken

    def _said(self, body: Any) -> bytes | None:
        """All that is sealed of a request but the digest of its body; None when it is refused."""
        # Adapters are pure, and many a field is left out of the same sample.
        key = repr(body)
        if key not in self._known:
            self._known[key] = self._sealed_but_body(body)
        return self._known[key]

    def _sealed_but_body(self, body: Any) -> bytes | None:
        try:
            envelope = _sealed(self._ask(body)).envelope
        except InvalidField:
            return None
        execution = msgspec.structs.replace(envelope.execution, request=None)
        return canonical(msgspec.structs.replace(envelope, execution=execution))

    def _without_canary(self, body: Any, path: str) -> bool:
        """Looks for what is put at the path; whether such a request is taken at all."""
        bodies = []
        for canary in _CANARIES:
            held = planted(body, path, canary)
            if held is None:
                return False
            try:
                bodies.append(_sealed(self._ask(held)).body)
            except InvalidField as error:
                assert canary not in str(error), f"expected no message with the value of `{path}` in it"
                continue
            assert canary.encode() not in bodies[-1], f"expected `{path}` to be nowhere in the envelope"
        assert len(set(bodies)) <= 1, f"expected `{path}` not to be in the digest, because digests can be guessed"
        return bool(bodies)

    def _sealed_or_refused(self, body: Any) -> None:
        try:
            _sealed(self.make_adapter()(body, self._context()))
        except InvalidField as error:
            assert error.field, "expected the name of a field"
            assert len(str(error)) < _MAX_MESSAGE, f"expected a message of less than {_MAX_MESSAGE} characters"
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"expected an ask or `InvalidField`, got `{kind}` for {_shown(body)}") from error


def _sealed(ask: Ask) -> SealedEnvelope:
    return seal(dataclasses.replace(ask, subject=ask.subject or Subject("user", "contract")), id="contract", now=START)


def _covered(path: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns is the path, or leads to something that it is in."""
    steps = path.split(".")
    return any(
        len(pattern) <= len(steps) and all(a in ("*", b) for a, b in zip(pattern, steps, strict=False))
        for pattern in (each.split(".") for each in patterns)
    )


def _same(one: Any, other: Any) -> bool:
    """As JSON: in Python, True is 1 and 1.0 too."""
    return type(one) is type(other) and repr(one) == repr(other)


def _shown(body: Any) -> str:
    try:
        return repr(body)[:500]
    except (RecursionError, ValueError):
        return "a body that is too deep or too large to be shown"


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _names(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing"

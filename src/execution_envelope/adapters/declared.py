"""Adapters that are declared: which field of the body becomes what. What this cannot say is a plain function.

::

    describe_job = Mapped(
        kind="evaluation",
        operation="jobs.create",
        target="model",
        target_id="model",
        resources={"samples": "limit", "duration": Raw("timeout", unit="s"), "requests": Always(1)},
        constraints={"engine": "options.engine", "env": Names("env")},
        scope={"project": "project", "workroom": Header("x-workroom-id")},
        client_defaults={"engine": "auto"},
        secrets=["env.*"],
        schema="example.Job/1",
        not_admitted=["comment"],
    )

A path leads through objects, by names with dots between them; of a tuple of paths the first that leads to a value
counts, for a field that has two names. Null is absent. What is in a list, or has a dot in its name, is for a function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final, TypeAlias

from execution_envelope.adapters import Context
from execution_envelope.credentials import shown
from execution_envelope.envelope import KINDS, Ask, Scope, Target
from execution_envelope.errors import InvalidField
from execution_envelope.resources import UNKNOWN, Per, known, parse_amount, parse_quantity, remembered

Path: TypeAlias = str | tuple[str, ...]
#: The same taken apart, each with its name for an error.
_Steps: TypeAlias = tuple[tuple[tuple[str, ...], str], ...]


#: How deep an open object is looked through for names of secrets, and how many it may have. What is deeper is taken out
#: as a whole; with more of them the whole object is.
MAX_SECRET_DEPTH: Final = 8
MAX_SECRET_NAMES: Final = 64

#: Where a word of a name begins and ends: ``user_auth``, ``user-auth``, ``userAuth``.
_BEGINS, _ENDS = r"(?:^|[_.-]|(?-i:(?<=[a-z0-9])(?=[A-Z])))", r"(?:$|[_.-]|(?-i:(?=[A-Z])))"
#: A name of a field that says that it is a credential. ``token_secret_name`` says where one is kept, ``max_tokens`` how
#: many tokens of another sort. Keys are those that open something: ``partition_key`` and ``key`` alone name data. Words
#: that often begin another (``pin_memory``) have to be the last.
_SECRET_NAME: Final = re.compile(
    r"(?i)^(?!(?:max|min|num|n)_)(?!.*_(?:name|type|arn|count)$).*"
    r"(?:token|secret|passw|passphrase|credential|authorization|cookie|signature|connection_?string|bearer|jwt|keytab"
    r"|(?:api|access|account|private|shared|signing|encryption|ssh|hmac|master|client|subscription|license|storage"
    r"|sse[_-]?customer)[_-]?key|service[_-]?account[_-]?json"
    rf"|{_BEGINS}(?:auth|authz|sas|pwd|dsn){_ENDS}|{_BEGINS}(?:pass|pat|pin|otp)[0-9]*$)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Raw:
    """An amount as the caller writes it: where it stands, and what a number there counts.

    `unit` is what a bare number is of: ``MiB``, ``min``; without one it is of the resource's own (devices, cores,
    bytes, milliseconds, ...) and may be text with a unit, ``"512MiB"``. `per` says what it is counted for. A `floor`
    alone is what is asked for; beside a `ceiling` alone the amount is *unknown*. With `round_up` what is finer than
    the base unit counts as one more, never as less; else it is refused.
    """

    path: Path
    unit: str | None = None
    per: Per = "total"
    floor: Path | None = None
    ceiling: Path | None = None
    round_up: bool = False


@dataclass(frozen=True, slots=True)
class Always:
    """What every such request asks for, whatever is in it: one request, an amount that is *unknown*."""

    value: Any


@dataclass(frozen=True, slots=True)
class Names:
    """The sorted names of the object at `path`, without the values: environment variables."""

    path: Path


@dataclass(frozen=True, slots=True)
class Header:
    """The value of a header, by its lower-case name. Headers that carry credentials are never there."""

    name: str


@dataclass(frozen=True, slots=True)
class PathParam:
    """The value of a parameter in the route's path: of ``{model_id}`` that is ``PathParam("model_id")``."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """An adapter as a table. It is called as a function is, so it stands wherever one may: ``Admit(describe_job)``.

    `target` is the type of what the execution is about, `target_id` where its id stands; a request without one is
    refused, unless `unnamed` says what stands for it. `resources` maps names of the vocabulary to paths, `Raw` or
    `Always`; `constraints` open names to paths, `Names` or `Always`; `scope` names to paths or `Header`, its ``hints``
    to a mapping of these. `client_defaults` and `secrets` are those of `Ask`, names and paths of the body; where a
    secret has no place because something else than an object or a list is there, the request is refused.
    `secret_names` lists open objects in which every field is a secret too whose name says so: ``api_key``, ``token``.
    `not_admitted` lists the fields that are not part of admission, so in the digest of the body only: a path stands for
    all beneath it, one that ends in ``.*`` for those names of an open object that are mapped to nothing, and ``*`` for
    those of the body itself.

    Raises `InvalidField`: when it is made, naming the part of the declaration that cannot be; when it is called,
    naming the field of the body.
    """

    kind: str
    operation: str
    target: str
    target_id: Path | PathParam
    target_version: Path | None = None
    unnamed: str | None = None
    resources: Mapping[str, Path | Raw | Always] = field(default_factory=dict)
    constraints: Mapping[str, Path | Names | Always] = field(default_factory=dict)
    scope: Mapping[str, Any] = field(default_factory=dict)
    client_defaults: Mapping[str, Any] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    secret_names: Sequence[str] = ()
    schema: str
    entrypoint: str | None = None
    not_admitted: Sequence[str] = ()
    _plan: _Plan = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidField("kind", f"expected one of {', '.join(KINDS)}, got {shown(self.kind)}")
        for name in self.client_defaults:
            if name not in self.resources and name not in self.constraints:
                raise InvalidField(f"client_defaults.{name}", "expected a name among `resources` or `constraints`")
        for name, resource in self.resources.items():
            if isinstance(resource, Always):
                parse_quantity(name, resource.value, field=f"resources.{name}")
        object.__setattr__(self, "_plan", _Plan.of(self))
        covered = {path for path in self.not_admitted if not path.endswith(".*")}
        for path in self.paths:
            steps = path.split(".")
            if covered & {".".join(steps[: n + 1]) for n in range(len(steps))}:
                raise InvalidField(f"not_admitted.{path}", "expected a field that is mapped to nothing")
            if self._is_secret(steps):
                raise InvalidField(f"secrets.{path}", "expected a field that is mapped to nothing")

    def _is_secret(self, steps: Sequence[str]) -> bool:
        """Whether what stands there is taken out, so that no other place may show it."""
        return any(
            len(secret) <= len(steps) and all(a in ("*", b) for a, b in zip(secret, steps, strict=False))
            for secret in self._plan.secrets
        ) or any(
            tuple(steps[: len(inside)]) == inside and any(map(_SECRET_NAME.search, steps[len(inside) :]))
            for inside in (paths[0][0] for paths in self._plan.secret_names)
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the body that is mapped to something, sorted."""
        return tuple(sorted({name for path in self._plan.all for _, name in path}))

    def __call__(self, body: Any, context: Context) -> Ask:
        """The ask of one request, from its body as it arrived."""
        if not isinstance(body, Mapping):
            raise InvalidField("body", f"expected a JSON object, got `{type(body).__name__}`")
        plan = self._plan
        secrets = self.secrets
        for secret in plan.secrets:
            check_room(body, secret)
        for open_object in plan.secret_names:
            secrets = [*secrets, *_named_secrets(_look(body, open_object)[0], open_object[0][0])]
        return Ask(
            kind=self.kind,
            operation=self.operation,
            target=self._target(body, context),
            scope=_scope(plan.scope, body, context),
            requested={name: _amount(name, read, body) for name, read in plan.resources},
            constraints={name: _constraint(read, body) for name, read in plan.constraints},
            client_defaults=self.client_defaults,
            entrypoint=self.entrypoint,
            schema=self.schema,
            body=body,
            secrets=secrets,
        )

    def _target(self, body: Any, context: Context) -> Target:
        if isinstance(self.target_id, PathParam):
            id, where = context.path_params.get(self.target_id.name), f"path.{self.target_id.name}"
            found = None if id is None else str(id)
        else:
            id, where = _look(body, self._plan.target_id)
            found = _identifier(id, where)
        found = found or self.unnamed
        if found is None:
            raise InvalidField(where, f"expected the id of a {self.target}, got none")
        version, where = _look(body, self._plan.target_version)
        return Target(self.target, found, _identifier(version, where))


@dataclass(frozen=True, slots=True)
class _Quantified:
    """A `Raw` made ready: `factor` is how many base units one of its own unit is."""

    path: _Steps
    floor: _Steps
    ceiling: _Steps
    raw: Raw
    factor: int
    base: str


@dataclass(frozen=True, slots=True)
class _Named:
    """A `Names` made ready."""

    path: _Steps


@dataclass(frozen=True, slots=True)
class _Plan:
    """A declaration made ready, so that a request costs no look at how it was written."""

    target_id: _Steps
    target_version: _Steps
    resources: tuple[tuple[str, _Quantified | Always], ...]
    constraints: tuple[tuple[str, _Steps | Always | _Named], ...]
    scope: tuple[tuple[str, Any], ...]
    secrets: tuple[tuple[str, ...], ...]
    secret_names: tuple[_Steps, ...]
    all: tuple[_Steps, ...]

    @staticmethod
    def of(declared: Mapped) -> _Plan:
        seen: list[_Steps] = []

        def steps(path: Any, where: str) -> _Steps:
            found = _steps(path, where)
            seen.append(found)
            return found

        def scoped(values: Mapping[str, Any], where: str) -> tuple[tuple[str, Any], ...]:
            return tuple(
                (name, value if isinstance(value, Header) else steps(value, f"{where}.{name}"))
                for name, value in values.items()
            )

        def quantified(name: str, value: Any) -> _Quantified | Always:
            if isinstance(value, Always):
                return value
            where = f"resources.{name}"
            raw = value if isinstance(value, Raw) else Raw(value)
            base = known(name, field=where).unit
            # A bare one is of the vocabulary's own unit: a device, a core, a byte, a millisecond.
            one = parse_amount(name, 1 if raw.unit is None else f"1 {raw.unit}", field=f"{where}.unit")
            assert isinstance(one, int)
            floor, ceiling = (() if path is None else steps(path, where) for path in (raw.floor, raw.ceiling))
            return _Quantified(steps(raw.path, where), floor, ceiling, raw, one, base)

        def constrained(name: str, value: Any) -> _Steps | Always | _Named:
            if isinstance(value, Always):
                return value
            if isinstance(value, Names):
                return _Named(steps(value.path, f"constraints.{name}"))
            return steps(value, f"constraints.{name}")

        for name in declared.scope:
            if name not in Scope.__struct_fields__:
                names = ", ".join(Scope.__struct_fields__)
                raise InvalidField(f"scope.{name}", f"expected one of {names}; other names go into `hints`")
        hints = declared.scope.get("hints", {})
        return _Plan(
            target_id=() if isinstance(declared.target_id, PathParam) else steps(declared.target_id, "target_id"),
            target_version=() if declared.target_version is None else steps(declared.target_version, "target_version"),
            resources=tuple((name, quantified(name, value)) for name, value in declared.resources.items()),
            constraints=tuple((name, constrained(name, value)) for name, value in declared.constraints.items()),
            scope=(
                *scoped({name: value for name, value in declared.scope.items() if name != "hints"}, "scope"),
                *((("hints", scoped(hints, "scope.hints")),) if hints else ()),
            ),
            secrets=tuple(tuple(path.split(".")) for path in declared.secrets),
            secret_names=tuple(_steps(path, "secret_names") for path in declared.secret_names),
            all=tuple(seen),
        )


def _steps(path: Any, where: str) -> _Steps:
    paths = (path,) if isinstance(path, str) else path
    if not isinstance(paths, tuple) or not all(isinstance(each, str) and all(each.split(".")) for each in paths):
        raise InvalidField(where, "expected a path such as `limits.memory`, or a tuple of paths")
    return tuple((tuple(each.split(".")), each) for each in paths)


def _look(body: Any, paths: _Steps) -> tuple[Any, str]:
    """The value, None when there is none, and the field's name for an error."""
    where = ""
    for steps, name in paths:
        value = body
        for n, step in enumerate(steps):
            if value is None:
                break
            if not isinstance(value, Mapping):
                raise _no_object(steps[:n], value)
            value = value.get(step)
        where = where or f"body.{name}"
        if value is not None:
            return value, f"body.{name}"
    return None, where


def _no_object(steps: Sequence[str], value: Any) -> InvalidField:
    return InvalidField(".".join(("body", *steps)), f"expected an object, got `{type(value).__name__}`")


def check_room(body: Any, steps: Sequence[str], done: tuple[str, ...] = ()) -> None:
    """That a secret can only be where its path leads. What is of another shape could hold it and would keep it.

    `done` leads to `body`, for the name of the field in `InvalidField`.
    """
    if body is None:
        return
    step, rest = steps[0], steps[1:]
    inner: Sequence[tuple[str, Any]]
    if isinstance(body, Mapping):
        inner = list(body.items()) if step == "*" and rest else [(step, body.get(step))]
    elif isinstance(body, list) and step == "*":
        inner = [(str(n), item) for n, item in enumerate(body)] if rest else ()
    else:
        raise _no_object(done, body)
    if rest:
        for name, value in inner:
            check_room(value, rest, (*done, name if step != "*" else "*"))


def _named_secrets(value: Any, steps: tuple[str, ...]) -> list[str]:
    """The paths in an open object of fields whose name says that they are secrets."""
    if value is not None and not isinstance(value, Mapping):
        raise _no_object(steps, value)
    found: list[str] = []
    left: list[tuple[Any, tuple[str, ...]]] = [(value, steps)]
    while left:
        inner, at = left.pop()
        named: Iterable[tuple[Any, Any]] = ()
        if isinstance(inner, Mapping):
            named = inner.items()
        elif isinstance(inner, list):
            named = enumerate(inner)
        deepest = len(at) - len(steps) == MAX_SECRET_DEPTH
        for name, item in named:
            contains = isinstance(item, Mapping | list)
            if (deepest and contains) or _SECRET_NAME.search(str(name)):
                found.append(".".join((*at, str(name))))
                if len(found) > MAX_SECRET_NAMES:
                    return [".".join((*steps, "*"))]
            elif contains:
                left.append((item, (*at, str(name))))
    return found


def _identifier(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if type(value) is int and value.bit_length() <= 256:
        return str(value)
    raise InvalidField(where, f"expected text or a whole number, got `{type(value).__name__}`")


def _amount(resource: str, read: _Quantified | Always, body: Any) -> Any:
    if isinstance(read, Always):
        return read.value
    value, where = _look(body, read.path)
    raw = read.raw
    if raw.floor is None and raw.ceiling is None and raw.per == "total":
        return None if value is None else _checked(resource, _base(resource, read, value, where), where)
    (floor, floor_at), (ceiling, ceiling_at) = _look(body, read.floor), _look(body, read.ceiling)
    if value is None and floor is None and ceiling is None:
        return None
    low = None if floor is None else _checked(resource, _base(resource, read, floor, floor_at), floor_at)
    high = None if ceiling is None else _checked(resource, _base(resource, read, ceiling, ceiling_at), ceiling_at)
    amount = _checked(resource, _base(resource, read, value, where), where) if value is not None else low
    quantity = {"amount": UNKNOWN if amount is None else amount, "floor": low, "ceiling": high, "per": raw.per}
    if remembered(resource, quantity) is None:
        try:
            parse_quantity(resource, quantity, field="")
        except InvalidField as error:
            place = {".floor": floor_at, ".ceiling": ceiling_at}.get(error.field, where)
            raise InvalidField(place, str(error).rpartition(" - at ")[0]) from None
    return quantity


def _checked(resource: str, value: Any, where: str) -> Any:
    """As it is, when it is one that `Ask.requested` takes; so that an error names the field of the body."""
    if remembered(resource, value) is None:
        parse_quantity(resource, value, field=where)
    return value


def _base(resource: str, read: _Quantified, value: Any, where: str) -> Any:
    """The amount as `Ask.requested` takes it, exactly."""
    raw = read.raw
    if isinstance(value, bool) or not isinstance(value, int | float):
        if not isinstance(value, str) or raw.unit is not None:
            told = "an amount" if raw.unit is None else f"a number of {raw.unit}"
            raise InvalidField(where, f"expected {told} for {resource}, got `{type(value).__name__}`")
        return value
    if isinstance(value, int):
        if value.bit_length() > 256:
            raise InvalidField(where, f"expected an amount for {resource}, got {shown(value)}")
        return value if raw.unit is None else _face(value * read.factor, read.base)
    try:
        amount = Fraction(repr(value)) * read.factor
    except ValueError:
        raise InvalidField(where, f"expected an amount for {resource}, got {shown(value)}") from None
    if amount.denominator != 1 and not raw.round_up:
        raise InvalidField(where, f"expected a whole number of {read.base} for {resource}, got {shown(value)}")
    return _face(-(-amount.numerator // amount.denominator), read.base)


def _face(base: int, unit: str) -> int | str:
    """Base units as the face takes them: a bare number there is of whole devices and cores."""
    return f"{base}m" if unit == "milli" else base


def _constraint(read: _Steps | Always | _Named, body: Any) -> Any:
    if isinstance(read, Always):
        return read.value
    if not isinstance(read, _Named):
        return _look(body, read)[0]
    value, where = _look(body, read.path)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidField(where, f"expected an object, got `{type(value).__name__}`")
    return sorted(map(str, value)) or None


def _scope(reads: Sequence[tuple[str, Any]], body: Any, context: Context) -> dict[str, Any]:
    return {
        name: _scope(read, body, context) if name == "hints" else _scoped(name, read, body, context)
        for name, read in reads
    }


def _scoped(name: str, read: Header | _Steps, body: Any, context: Context) -> Any:
    value: Any
    if isinstance(read, Header):
        value, where = context.headers.get(read.name), f"headers.{read.name}"
    else:
        value, where = _look(body, read)
    if value is None:
        return None
    if name == "regions":
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list):
            raise InvalidField(where, f"expected text or a list of texts, got `{type(value).__name__}`")
    if isinstance(value, str) or type(value) is int or (isinstance(value, list) and all(map(_is_text, value))):
        return value
    raise InvalidField(where, f"expected text, a whole number or a list of texts, got `{type(value).__name__}`")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)

"""The fields of a JSON schema, other values for them, and requests in which one of them is changed."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

#: A name that no adapter can know: it stands for what an open object may hold beside the names that are mapped.
UNFORESEEN: Final = "unforeseen_1f6b"

#: What is tried for a field of each type. Of a text some adapters read an amount, others an id.
_OTHERS: Final[Mapping[str, Sequence[Any]]] = {
    "string": ("another", "other", "7", "9", "7Gi", "9Gi", "70m", "00000000-0000-4000-8000-000000000007"),
    "integer": (7, 9, 70, 900, 9000),
    "number": (7, 9, 0.5, 900),
    "boolean": (True, False),
    "null": (),
    "array": ([], ["another"], [7], [{"type": "another"}]),
    "object": ({}, {UNFORESEEN: "another"}),
}
#: Lists that begin with the same item, of each sort.
LISTS: Final[Sequence[Sequence[Any]]] = tuple(
    ([one], [one, one], [one, another]) for one, another in (("another", "other"), (7, 9), ([7], [7, 9]))
)
#: How deep a schema is followed; what refers to itself has no end.
_DEEPEST: Final = 12

_ABSENT: Final = object()


def schema_of(model: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic model, with every name by which its fields are taken: pydantic's own has one."""
    from pydantic import AliasChoices, AliasPath
    from pydantic.json_schema import GenerateJsonSchema

    class EveryName(GenerateJsonSchema):
        def model_schema(self, schema: Any) -> dict[str, Any]:
            found = super().model_schema(schema)
            config, properties = schema["cls"].model_config, found.get("properties", {})
            by_name = config.get("populate_by_name") or config.get("validate_by_name")
            by_alias = config.get("validate_by_alias", True)
            for name, field in schema["cls"].model_fields.items():
                alias = field.validation_alias if by_alias else None
                choices = alias.choices if isinstance(alias, AliasChoices) else [alias] if alias else []
                paths = [tuple(one.path) if isinstance(one, AliasPath) else (one,) for one in choices]
                paths += [(name,)] if by_name or not paths else []
                own = next((properties[each] for each, *rest in (*paths, (name,)) if each in properties), None)
                if own is None:
                    continue
                if (name,) not in paths:
                    properties.pop(name, None)
                for first, *rest in paths:
                    below = own
                    for step in reversed(rest):
                        inside = {"type": "array", "items": below}
                        below = inside if isinstance(step, int) else {"type": "object", "properties": {step: below}}
                    known = properties.get(first)
                    properties[first] = below if known is None or known == below else {"anyOf": [known, below]}
            return found

    plain: dict[str, Any] = model.model_json_schema(schema_generator=EveryName)
    return plain


class Fields:
    """Every field that a schema knows, by its path: names with dots between, ``*`` for an index or any other name.

    An object that may hold any names has a field for each that `samples` have in it, and one that stands for the rest.
    A field that `listed` names is not looked into.
    """

    def __init__(self, schema: Mapping[str, Any], samples: Sequence[Any], listed: Collection[str]) -> None:
        self._schema = schema
        self._samples = samples
        # What is listed by ``path.*`` may have others beside it that are mapped, so that is looked into.
        self._listed = {path for path in listed if not path.endswith(".*")}
        #: path -> values to try.
        self.values: dict[str, list[Any]] = {}
        #: Those that the schema says are secret: `format: password` or `writeOnly`.
        self.secret: set[str] = set()
        #: The names at the root that the schema does not know, with ``*`` for the rest; none where it is closed.
        self.others: set[str] = set()
        self._walk(schema, (), ())

    def _walk(self, node: Any, path: tuple[str, ...], seen: tuple[str, ...]) -> None:
        name = ".".join(path)
        nodes, seen = self._alternatives(node, seen)
        if name and any(each.get("format") == "password" or each.get("writeOnly") for each in nodes):
            self.secret.add(name)
        inner = False
        if name not in self._listed and len(path) < _DEEPEST:
            for each in nodes:
                for step, property in each.get("properties", {}).items():
                    inner = True
                    self._walk(property, (*path, step), seen)
                items = each.get("items")
                if isinstance(items, Mapping) and any(n.get("properties") for n in self._alternatives(items, seen)[0]):
                    inner = True
                    self._walk(items, (*path, "*"), seen)
                if _is_open(each):
                    inner = True
                    self._open(path, [_at(sample, path) for sample in self._samples], each.get("properties", ()))
        others = [each for each in nodes if not each.get("properties") and _types(each) != ["null"]]
        if name and (not inner or any(not _is_open(each) and "array" not in _types(each) for each in others)):
            self.values.setdefault(name, []).extend(value for each in others or nodes for value in _values(each))

    def _open(self, path: tuple[str, ...], found: Sequence[Any], known: Collection[str] = ()) -> None:
        """The names that the samples have in an object that may hold any, but those that the schema knows."""
        names = {step for value in found if isinstance(value, Mapping) for step in value if step not in known}
        if not path:
            self.others |= {"*", *map(str, names)}
        for value in found:
            for step, inner in value.items() if isinstance(value, Mapping) else ():
                if step not in names:
                    continue
                below = (*path, str(step))
                name = ".".join(below)
                if isinstance(inner, Mapping) and name not in self._listed and len(path) < _DEEPEST:
                    self._open(below, [inner])
                else:
                    self.values.setdefault(name, []).extend(_values({}))
        self.values.setdefault(".".join((*path, "*")), []).extend(_values({}))

    def _alternatives(self, node: Any, seen: tuple[str, ...]) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
        """What a schema may stand for, without references. What refers to itself is looked into once."""
        if not isinstance(node, Mapping):
            return [{}], seen
        reference = node.get("$ref")
        if isinstance(reference, str):
            if reference in seen:
                return [{"enum": [{}, {UNFORESEEN: "another"}, "another"]}], seen
            found: Any = self._schema
            for step in reference.removeprefix("#/").split("/"):
                found = found[step]
            return self._alternatives({**found, **{k: v for k, v in node.items() if k != "$ref"}}, (*seen, reference))
        parts = [part for word in ("anyOf", "oneOf", "allOf") for part in node.get(word, ())]
        if not parts:
            return [node], seen
        outer = {word: value for word, value in node.items() if word in ("format", "writeOnly")}
        nodes: list[Mapping[str, Any]] = [node] if node.get("properties") else []
        for part in parts:
            more, followed = self._alternatives(part, seen)
            nodes += [{**each, **outer} for each in more]
            seen = tuple(dict.fromkeys((*seen, *followed)))
        return nodes, seen


def _is_open(node: Mapping[str, Any]) -> bool:
    """Whether any name may be in it: an object of which no name, or more than those, is said."""
    extra = node.get("additionalProperties")
    return "object" in _types(node) and ("properties" not in node or (extra is not None and extra is not False))


def _types(node: Mapping[str, Any]) -> list[str]:
    found = node.get("type", list(_OTHERS) if not node.keys() & {"enum", "const", "properties", "items"} else ())
    return [found] if isinstance(found, str) else list(found)


def _values(node: Mapping[str, Any]) -> list[Any]:
    if "const" in node:
        return [node["const"]]
    if "enum" in node:
        return list(node["enum"])
    return [value for name in _types(node) for value in _OTHERS.get(name, ())]


def _at(value: Any, steps: Sequence[str], item: int = 0) -> Any:
    """What stands at a path, `_ABSENT` where nothing does; of a list the first item, or the last one: -1."""
    for step in steps:
        if step == "*" and isinstance(value, list) and value:
            value = value[item]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            return _ABSENT
    return value


def variants(
    body: Any, path: str, values: Sequence[Any], samples: Sequence[Any], *, last: bool = False
) -> Iterator[tuple[bool, Any]]:
    """`body` as it is but with all that the field stands in, then without the field, then with each value in it.

    Beside each stands whether it has a value: one of those that the samples have there, or of `values`. With `last` it
    is the field in the last item of lists that have two or more; where no list leads to it there is nothing then.
    """
    steps, item = path.split("."), -1 if last else 0
    found = [_at(sample, steps) for sample in samples]
    values = [*(value for value in found if value is not _ABSENT), *values]
    for n, value in enumerate((_ABSENT, _ABSENT, *values)):
        changed = copy.deepcopy(body)
        held = _holder(changed, steps)
        if held is not None and last:
            held = _holder(changed, steps, item) if _doubled(changed, steps) else None
        if held is None:
            return
        if n == 0:
            yield False, changed
            continue
        if isinstance(held, list):
            at = slice(-1, None) if last else slice(1)
            held[at] = [] if value is _ABSENT else [copy.deepcopy(value)]
        else:
            name = steps[-1] if steps[-1] != "*" else UNFORESEEN
            held.pop(name, None)
            if value is not _ABSENT:
                held[name] = copy.deepcopy(value)
        yield value is not _ABSENT, changed


def _doubled(value: Any, steps: Sequence[str]) -> bool:
    """Whether a list leads to the field; those that do have two items or more afterwards."""
    found = False
    for step in steps:
        if step == "*" and isinstance(value, list):
            if not value:
                break
            if len(value) == 1:
                value.append(copy.deepcopy(value[0]))
            found, value = True, value[-1]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            break
    return found


def _holder(body: Any, steps: Sequence[str], item: int = 0) -> Any:
    """What the field stands in, made where it is not there; None where something else is."""
    for step, following in itertools.pairwise(steps):
        inside = _at(body, (step,), item)
        if inside is _ABSENT or inside is None:
            # Where a field is in something of any name or index, a list is what most often is meant.
            inside = [{}] if following == "*" and steps[-1] != "*" else {}
            if isinstance(body, list) and step == "*":
                body.append(inside)
            elif isinstance(body, dict):
                body[step if step != "*" else UNFORESEEN] = inside
            else:
                return None
        body = inside
    return body if isinstance(body, dict) or (isinstance(body, list) and steps[-1] == "*") else None


def planted(body: Any, path: str, value: Any) -> Any:
    """`body` with this value at the path, or None where there is no place for it."""
    return next((changed for has, changed in variants(body, path, [value], ()) if has), None)


def seeded(samples: Sequence[Any], fields: Sequence[str], rounds: int, seed: int = 0) -> Iterator[Any]:
    """Arbitrary JSON, and samples in which something arbitrary stands, the same every time."""
    chance = random.Random(seed)
    names = sorted({step for path in fields for step in path.split(".") if step != "*"})
    for _ in range(rounds):
        value = _arbitrary(chance, names, 4)
        if chance.random() < 0.3 or not fields:
            yield value
            continue
        body: Any = chance.choice(samples)
        for _ in range(chance.randint(1, 3)):
            body = planted(body, chance.choice(fields), value) or body
            value = _arbitrary(chance, names, 3)
        yield body


#: What is on the edge of something: of numbers, of units, of text.
EDGES: Final[Sequence[Any]] = (
    *(None, True, False, 0, 1, -1, 2**53, -(2**63), 10**400, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -0.0),
    *("", "1", "-1", "500m", "16Gi", "1e999", "unknown", "unlimited", "\ud800", "\x00", "a" * 2000, "[redacted:", "*"),
)


def _arbitrary(chance: random.Random, names: Sequence[str], depth: int) -> Any:
    kind = chance.random()
    if depth == 0 or kind < 0.5:
        return chance.choice(EDGES)
    if kind < 0.7:
        return [_arbitrary(chance, names, depth - 1) for _ in range(chance.randint(0, 3))]
    some = [*chance.sample(names, min(len(names), 3)), "", "a.b", "é", "*"]
    return {name: _arbitrary(chance, names, depth - 1) for name in chance.sample(some, chance.randint(0, 4))}

"""YAML read strictly: plain data as in JSON, nothing twice, nothing by reference, nothing deep.

Of YAML's implicit types only those of its core schema are there: ``no`` and ``2026-11-01`` are texts.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

import yaml

from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.policy.watched import MAX_BYTES

MAX_DEPTH: Final = 12

#: The C parser, where it was built; both read the same.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _Refused(f"expected a text as key, got {shown(key)}", key_node)
            if key in seen:
                raise _Refused(f"expected each key once, got {shown(key)} again", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=True)

    def flatten_mapping(self, node: Any) -> None:
        """``<<`` is a key like any other."""


class _Refused(yaml.YAMLError):
    def __init__(self, message: str, node: Any) -> None:
        mark = node.start_mark
        super().__init__(f"{message} (line {mark.line + 1}, column {mark.column + 1})")


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]{1,3})?", "-+.0123456789"),
    ("null", r"~|null|", ["~", "n", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def read_yaml(text: bytes, path: str) -> Any:
    """One YAML document as plain data; None for an empty one. Raises `InvalidField` naming `path`."""
    if len(text) > MAX_BYTES:
        raise invalid(path, f"expected up to {MAX_BYTES} bytes, got {len(text)}")
    try:
        source = text.decode("utf-8")
        _look_through(source)
        return yaml.load(source, Loader=_Loader)
    except UnicodeDecodeError:
        raise invalid(path, "expected text in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise invalid(path, f"expected YAML, {brief(error.problem or 'it cannot be read', 120)}{where}") from None
    except yaml.YAMLError as error:
        said = str(error).partition("\n")[0]
        raise invalid(path, said if said.startswith("expected") else f"expected YAML, {brief(said, 120)}") from None
    except (ValueError, TypeError, OverflowError) as error:
        # The constructors of single values let these through.
        raise invalid(path, f"expected YAML, {brief(str(error), 120)}") from None


def _look_through(source: str) -> None:
    """Before anything is built of it, so that what is deep, or refers to itself, is never built."""
    depth = 0
    for event in yaml.parse(source, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("expected no alias, write it out", event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Refused(f"expected up to {MAX_DEPTH} levels", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1

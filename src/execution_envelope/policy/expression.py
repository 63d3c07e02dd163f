"""One CEL expression: compiled, and checked against what the envelope has before it ever runs.

The engine checks nothing before it evaluates. So what an expression names is found in its tokens: a variable, a field
or a function that does not exist is an error at load, and what is read decides which part of the envelope is handed
over at all, and which governance hints were read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cel

from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.policy.view import NOTHING, OPEN, SHAPE, Shape, Wanted

#: The longest expression, in characters; with its variables written out it may have four times as many.
MAX_EXPRESSION: Final = 4096
#: What CEL's standard functions and macros are called here; others do not exist.
FUNCTIONS: Final = frozenset(
    {
        "size",
        "contains",
        "startsWith",
        "endsWith",
        "matches",
        "duration",
        "timestamp",
        "int",
        "uint",
        "double",
        "string",
        "bytes",
        "type",
        "dyn",
        "getFullYear",
        "getMonth",
        "getDate",
        "getDayOfMonth",
        "getDayOfWeek",
        "getDayOfYear",
        "getHours",
        "getMinutes",
        "getSeconds",
        "getMilliseconds",
    }
)
MACROS: Final = ("has", "all", "exists", "exists_one", "map", "filter")
_BINDING: Final = frozenset(MACROS) - {"has"}

_TOKEN: Final = re.compile(
    r"""
      (?P<blank>\s+|//[^\n]*)
    | (?P<text>
        [bB]?[rR][bB]?(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"[^"\n]*"|'[^'\n]*')
      | [bB]?(?:\"{3}(?:\\.|.)*?\"{3}|'{3}(?:\\.|.)*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      )
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<number>[0-9](?:[A-Za-z0-9_.]|(?<=[eE])[+-])*)
    | (?P<sign>.)
    """,
    re.X | re.S,
)
#: A text without an escape, whose value is what stands between the quotes.
_SIMPLE: Final = re.compile(r"""(["'])([^"'\\]*)\1""")
_WHERE: Final = re.compile(r"ERROR: <input>:(\d+):(\d+): ([^\n]*)")


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression. `reads` are the paths in the view that it may read, `hints` the names of the governance
    hints among them, None for any, `size` its characters with what variables stand for."""

    source: str
    program: Any
    reads: frozenset[tuple[str, ...]]
    hints: frozenset[str] | None
    size: int


def compile_expression(source: str, path: str, variables: Mapping[str, str] | None = None) -> Expression:
    """Raises `InvalidField` naming `path` for what does not parse, or names what does not exist.

    `variables` are expressions by name; ``variables.NAME`` stands for one of them.
    """
    if len(source) > MAX_EXPRESSION:
        raise invalid(path, f"expected an expression of up to {MAX_EXPRESSION} characters, got {len(source)}")
    written = written_out(source, path, variables or {})
    try:
        program = cel.compile(written)
    except ValueError as error:
        raise invalid(path, f"expected a CEL expression, {_parse_error(str(error))}") from None
    tokens = list(_tokens(written))
    bound = _bound(tokens, path)
    used = program.references()
    for name in used["variables"]:
        if name not in SHAPE and name not in bound:
            raise invalid(path, f"expected one of {', '.join(SHAPE)}, got {shown(name)}")
    for name in used["functions"]:
        if name[0].isalpha() and name not in FUNCTIONS:
            raise invalid(path, f"expected a function of CEL, got {shown(name)}")
    chains = list(_chains(tokens))
    reads = frozenset(_known(chain, path) for chain in chains)
    hinted = [chain for chain in reads if chain[0] == "scope" and chain[1:2] in ((), ("hints",))]
    hints = None if any(len(chain) < 3 for chain in hinted) else frozenset(chain[2] for chain in hinted)
    return Expression(source, program, reads, hints, len(written))


def wanted(reads: frozenset[tuple[str, ...]]) -> Wanted:
    """The part of the view that has all of these paths."""
    tree: dict[str, Any] = {}
    for path in sorted(reads, key=len):
        level: dict[str, Any] = tree
        for name in path[:-1]:
            below = level.setdefault(name, {})
            if below is None:
                break
            level = below
        else:
            level.setdefault(path[-1], None)
    return tree


def written_out(source: str, path: str, variables: Mapping[str, str]) -> str:
    """`source` with each ``variables.NAME`` replaced by what that stands for."""
    tokens = list(_tokens(source))
    parts: list[str] = []
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        if (kind, text) == ("name", "variables") and not _is_field(tokens, place):
            dot, name = (*tokens[place + 1 : place + 3], ("", ""), ("", ""))[:2]
            if dot[1] != "." or name[0] != "name":
                raise invalid(path, "expected `variables.NAME`, got `variables`")
            if name[1] not in variables:
                known = ", ".join(variables) or "none"
                raise invalid(path, f"expected a variable that is declared before ({known}), got {shown(name[1])}")
            parts.append(f"({variables[name[1]]})")
            place += 3
            continue
        # Blanks were left out, and two names side by side are two.
        parts.append(text if not parts or kind not in ("name", "number", "text") else f" {text}")
        place += 1
    if len(parts) == len(tokens) and place == len(tokens) and "variables" not in source:
        return source
    result = "".join(parts)
    if len(result) > 4 * MAX_EXPRESSION:
        raise invalid(path, f"expected up to {4 * MAX_EXPRESSION} characters with variables, got {len(result)}")
    return result


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    for match in _TOKEN.finditer(source):
        if match.lastgroup != "blank":
            yield match.lastgroup or "", match[0]


def _is_field(tokens: Sequence[tuple[str, str]], place: int) -> bool:
    return place > 0 and tokens[place - 1][1] == "."


def _bound(tokens: Sequence[tuple[str, str]], path: str) -> frozenset[str]:
    """The variables that macros bind: ``x`` in ``roles.exists(x, x == "a")``."""
    bound = set()
    for place, (_, text) in enumerate(tokens):
        after = tokens[place + 1 : place + 4]
        if text in _BINDING and _is_field(tokens, place) and len(after) == 3:
            (_, opening), (kind, name), (_, comma) = after
            if (opening, kind, comma) == ("(", "name", ","):
                if name in SHAPE:
                    raise invalid(path, f"expected another name for the variable of a macro, got {shown(name)}")
                bound.add(name)
    return frozenset(bound)


def _chains(tokens: Sequence[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    """Every path that starts at a family: ``scope.hints["a"]`` is (scope, hints, a). What is not a name ends it."""
    for place, (kind, text) in enumerate(tokens):
        if kind != "name" or text not in SHAPE or _is_field(tokens, place):
            continue
        chain, at = [text], place + 1
        while at + 1 < len(tokens):
            (_, sign), (next_kind, next_text) = tokens[at], tokens[at + 1]
            then = tokens[at + 2][1] if at + 2 < len(tokens) else ""
            if sign == "." and next_kind == "name" and then != "(":
                chain.append(next_text)
                at += 2
            elif sign == "[" and next_kind == "text" and then == "]" and (key := _SIMPLE.fullmatch(next_text)):
                chain.append(key[2])
                at += 3
            else:
                break
        # `has(x)` asks only whether it is there: of what has fields none is read.
        asked = place >= 2 and tokens[place - 2][1] == "has" and at < len(tokens) and tokens[at][1] == ")"
        yield (*chain, NOTHING) if asked and _has_fields(chain) else tuple(chain)


def _has_fields(chain: Sequence[str]) -> bool:
    shape: Shape | None = SHAPE
    for name in chain:
        shape = (shape or OPEN).get(name)
    return bool(shape)


def _known(chain: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The chain as far as the view's shape goes. Raises `InvalidField` for a field that does not exist."""
    shape: Shape | None = SHAPE[chain[0]]
    for place, name in enumerate(chain[1:], 1):
        if shape is None:
            return chain[:place]
        if shape is OPEN:
            return chain[: place + 1]
        if name not in shape and name is not NOTHING:
            where = ".".join(chain[:place])
            raise invalid(path, f"expected a field of {where} ({', '.join(shape)}), got {shown(name)}")
        shape = shape.get(name)
    return chain


def _parse_error(text: str) -> str:
    found = _WHERE.search(text)
    if found is None:
        return brief(text.partition("\n")[0], 120)
    line, column, said = found.groups()
    return f"{brief(said.lower(), 120)} (line {line}, column {column})"

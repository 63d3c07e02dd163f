"""The filter language: which envelopes somebody wants to see, in Python, commands, HTTP and pages alike.

``kind=model.deploy and state in (granted, admitted) and cause=quota and granted.gpu<2 and created>=7d``

Terms are joined by ``and``, ``or``, ``not`` and parentheses; `criteria` has the fields. A query says of each row
whether it matches, and nothing else: no order, no sum.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn

from execution_envelope.credentials import shown
from execution_envelope.criteria import (
    FIELDS,
    FLAGS,
    SIDES,
    STATES,
    Absent,
    All,
    Compare,
    Condition,
    Contains,
    Either,
    Equal,
    Flagged,
    Measure,
    Not,
    Op,
    Searched,
    Within,
    coded,
    folded,
)
from execution_envelope.envelope import timestamp
from execution_envelope.errors import InvalidField
from execution_envelope.resources import UNKNOWN, UNLIMITED, VOCABULARY, parse_amount

#: Characters of a query, values and conditions in it, and how deep parentheses and `not` may be.
MAX_LENGTH: Final = 2000
MAX_TERMS: Final = 100
MAX_DEPTH: Final = 16

ABSENT: Final = "absent"

_AMOUNT: Final = re.compile(f"({'|'.join(SIDES)})\\.([a-z_]+)")
_AGE: Final = re.compile(r"([0-9]{1,6})(s|m|min|h|d|w)")
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_ORDERED: Final[Mapping[str, Op]] = {"<": "<", "<=": "<=", ">": ">", ">=": ">="}
_FIRST: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Query:
    """A query as it was written, and what it asks."""

    text: str
    condition: Condition = field(repr=False)

    @classmethod
    def parse(cls, text: str, now: datetime) -> Query:
        """Read a query; ages are counted back from `now`.

        Raises `InvalidField` at `query`, with the position of the character where it cannot be read.
        """
        return cls(text, _Reader(text, now).query())

    def matches(self, row: Searched) -> bool:
        """Whether the row is one of those that are asked for."""
        return self.condition.matches(row)


def quoted(value: str) -> str:
    """A value so that it can stand in the text of a query, whatever it is."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


# Reading

_TOKEN: Final = re.compile(
    r"""(?P<op><=|>=|!=|!~|[=~<>])|(?P<mark>[(),])|(?P<quoted>"(?:[^"\\]|\\["\\])*"|'(?:[^'\\]|\\['\\])*')"""
    r"""|(?P<word>[^\s(),"'=~<>!]+)"""
)
_SPACE: Final = re.compile(r"\s*")
_ESCAPE: Final = re.compile(r"\\(.)", re.S)
_JOINS: Final = frozenset({"and", "or", "not", "in"})


@dataclass(frozen=True, slots=True)
class _Token:
    sort: str
    text: str
    at: int

    @property
    def shown(self) -> str:
        return "the end" if self.sort == "end" else shown(self.text)

    def said(self, *words: str) -> bool:
        return self.sort in ("word", "mark", "op") and self.text.lower() in words


def _fail(at: int, message: str) -> NoReturn:
    raise InvalidField("query", f"{message}, at character {at + 1}")


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while True:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        if at == len(text):
            yield _Token("end", "", at)
            return
        found = _TOKEN.match(text, at)
        if found is None:
            if text[at] in "\"'":
                _fail(at, "expected a closing quote (inside, write \\ before a quote or another \\)")
            _fail(at, f"expected a field, a comparison or a value, got {shown(text[at])}")
        sort = found.lastgroup or ""
        value = _ESCAPE.sub(r"\1", found[0][1:-1]) if sort == "quoted" else found[0]
        yield _Token(sort, value, at)
        at = found.end()


class _Reader:
    """Recursive descent over the tokens."""

    def __init__(self, text: str, now: datetime) -> None:
        if not isinstance(text, str):
            raise InvalidField("query", f"expected text, got {shown(text)}")
        if len(text) > MAX_LENGTH:
            raise InvalidField("query", f"expected up to {MAX_LENGTH} characters, got {len(text)}")
        for at, character in enumerate(text):
            if character == "\0" or "\ud800" <= character <= "\udfff":
                _fail(at, "expected text without the character zero and without halves of characters")
        self._tokens = list(_tokens(text))
        self._now = now.astimezone(UTC)
        self._next = 0
        self._terms = 0

    def query(self) -> Condition:
        """The whole of it."""
        condition = self._any(0)
        if self._peek.sort != "end":
            _fail(self._peek.at, f"expected `and`, `or` or the end, got {self._peek.shown}")
        return condition

    @property
    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek
        self._next += token.sort != "end"
        return token

    def _taken(self, *words: str) -> bool:
        if self._peek.said(*words):
            self._next += 1
            return True
        return False

    def _any(self, depth: int) -> Condition:
        found = [self._all(depth)]
        while self._taken("or"):
            found.append(self._all(depth))
        return found[0] if len(found) == 1 else Either(tuple(found))

    def _all(self, depth: int) -> Condition:
        found = [self._one(depth)]
        while self._taken("and"):
            found.append(self._one(depth))
        return found[0] if len(found) == 1 else All(tuple(found))

    def _one(self, depth: int) -> Condition:
        token = self._peek
        if depth > MAX_DEPTH:
            _fail(token.at, f"expected parentheses and `not` up to {MAX_DEPTH} deep")
        if self._taken("not"):
            return Not(self._one(depth + 1))
        if self._taken("("):
            inner = self._any(depth + 1)
            if not self._taken(")"):
                _fail(self._peek.at, f"expected `and`, `or` or `)`, got {self._peek.shown}")
            return inner
        return self._term()

    def _term(self) -> Condition:
        token = self._take()
        if token.sort != "word" or token.said(*_JOINS):
            _fail(token.at, f"expected a condition, such as `state=open`, got {token.shown}")
        name = token.text.lower()
        amount = _AMOUNT.fullmatch(name)
        if name in FLAGS and self._peek.sort != "op":
            self._count(token)
            return Flagged(name)
        if amount is not None:
            return self._amount(self._measure(amount, token))
        if name not in FIELDS:
            self._unknown(token)
        if FIELDS[name].sort == "time":
            return self._time(name)
        return self._text(name)

    def _unknown(self, token: _Token) -> NoReturn:
        name = token.text.lower()
        known = [*FIELDS, *FLAGS, *(f"{side}.{resource}" for side in SIDES for resource in VOCABULARY)]
        if name in FLAGS:
            _fail(token.at, f"expected the flag `{name}` alone, without a comparison")
        near = difflib.get_close_matches(name[:64], known, 1)
        if near:
            _fail(token.at, f"expected a field, got {token.shown}: did you mean `{near[0]}`?".rstrip("?"))
        sides = ", ".join(f"{side}.RESOURCE" for side in SIDES)
        _fail(token.at, f"expected a field ({', '.join((*FIELDS, *FLAGS))}, {sides}), got {token.shown}")

    def _count(self, token: _Token) -> None:
        self._terms += 1
        if self._terms > MAX_TERMS:
            _fail(token.at, f"expected up to {MAX_TERMS} values and flags")

    def _op(self, *allowed: str) -> _Token:
        token = self._take()
        if token.text.lower() in allowed and (token.sort == "op" or token.said("in")):
            return _Token("op", token.text.lower(), token.at)
        _fail(token.at, f"expected one of {' '.join(allowed)}, got {token.shown}")

    def _value(self) -> _Token:
        token = self._take()
        if token.sort == "quoted" or (token.sort == "word" and not token.said(*_JOINS)):
            self._count(token)
            return token
        _fail(token.at, f"expected a value, in quotes where it is not one plain word, got {token.shown}")

    def _list(self) -> list[_Token]:
        if not self._taken("("):
            _fail(self._peek.at, f"expected `(` and values, got {self._peek.shown}")
        found = [self._value()]
        while self._taken(","):
            found.append(self._value())
        if not self._taken(")"):
            _fail(self._peek.at, f"expected `,` or `)`, got {self._peek.shown}")
        return found

    def _text(self, name: str) -> Condition:
        like = ("~", "!~") if FIELDS[name].sort == "text" else ()
        op = self._op("=", "!=", *like, "in")
        if op.text in like:
            value = self._value()
            if not value.text:
                _fail(value.at, "expected some text to look for")
            condition: Condition = Contains(name, folded(value.text))
        else:
            values = self._list() if op.text == "in" else [self._value()]
            condition = Equal(name, frozenset().union(*(self._words(name, value) for value in values)))
        return Not(condition) if op.text.startswith("!") else condition

    @staticmethod
    def _words(name: str, value: _Token) -> Collection[str]:
        words = FIELDS[name].words
        if words and value.text not in words:
            _fail(value.at, f"expected {', '.join(words)} for `{name}`, got {value.shown}")
        return STATES[value.text] if name == "state" else (value.text,)

    def _time(self, name: str) -> Condition:
        op = self._op("<", "<=", ">", ">=", "=", "!=")
        value = self._value()
        start, end = self._span(value, op.text in ("=", "!="))
        if op.text in ("=", "!="):
            within = Within(name, start, end)
            return Not(within) if op.text == "!=" else within
        bounds = {"<": (None, start), "<=": (None, end), ">": (end, None), ">=": (start, None)}
        return Within(name, *bounds[op.text])

    def _span(self, value: _Token, exact: bool) -> tuple[str, str]:
        """From when on and before when: a moment, or a whole UTC day."""
        age, length = _AGE.fullmatch(value.text), timedelta(microseconds=1)
        try:
            if age is not None and not exact:
                back = timedelta(seconds=int(age[1]) * _SECONDS[age[2]])
                start = self._now - min(back, self._now - _FIRST)
            elif _DAY.fullmatch(value.text):
                start, length = datetime.fromisoformat(value.text).replace(tzinfo=UTC), timedelta(days=1)
            else:
                start = datetime.fromisoformat(value.text)
                if start.tzinfo is None or "T" not in value.text.upper():
                    raise ValueError(value.text)
                start = start.astimezone(UTC)
            end = start + length
        except (ValueError, OverflowError):
            ages = "" if exact else " or an age such as `7d` or `30m`"
            day = "a day such as `2026-05-01`, a time such as `2026-05-01T12:00:00Z`"
            _fail(value.at, f"expected {day}{ages}, got {value.shown}")
        if start < _FIRST:
            _fail(value.at, f"expected a time from 1970 on, got {value.shown}")
        return timestamp(start), timestamp(end)

    @staticmethod
    def _measure(found: re.Match[str], token: _Token) -> Measure:
        if found[2] not in VOCABULARY:
            _fail(token.at, f"expected a resource ({', '.join(VOCABULARY)}), got {shown(found[2])}")
        return Measure(found[1], found[2])

    def _amount(self, measure: Measure) -> Condition:
        op = self._op("=", "!=", "<", "<=", ">", ">=", "in")
        if op.text in ("=", "!=", "in"):
            values = self._list() if op.text == "in" else [self._value()]
            found = tuple(self._compared(measure, "=", value) for value in values)
            condition = found[0] if len(found) == 1 else Either(found)
            return Not(condition) if op.text == "!=" else condition
        return self._compared(measure, _ORDERED[op.text], self._value())

    def _compared(self, measure: Measure, op: Op, value: _Token) -> Condition:
        if value.text in (ABSENT, UNKNOWN, UNLIMITED) and op != "=":
            _fail(value.at, f"expected `=` or `!=` before `{value.text}`, which is no number")
        if value.text == ABSENT:
            return Absent(measure)
        other = _AMOUNT.fullmatch(value.text.lower()) if value.sort == "word" else None
        if other is not None:
            bound = self._measure(other, value)
            units = [VOCABULARY[one.resource].unit for one in (measure, bound)]
            if units[0] != units[1]:
                _fail(value.at, f"expected an amount in {units[0]}, {bound.resource} is in {units[1]}")
            return Compare(measure, op, bound)
        try:
            amount = parse_amount(measure.resource, value.text, field="query")
        except InvalidField as error:
            _fail(value.at, str(error).removesuffix(" - at `query`"))
        return Compare(measure, op, coded(amount))

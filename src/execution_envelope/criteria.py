"""What a query can ask for, and the conditions that it is made of.

`FIELDS`, `FLAGS` and `SIDES` are what can be asked for. A condition says of each row whether it matches. It is data:
what carries it out elsewhere hands the values on as parameters.

What many envelopes have in common (kind, state, causes, hooks...) is their *shape*, see `Alike`. A query can be asked
about a shape alone: yes, no, or that it depends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, get_args

from execution_envelope.delta import Outcome
from execution_envelope.envelope import KINDS
from execution_envelope.lifecycle import CAUSES, OPEN, TERMINAL
from execution_envelope.resources import UNKNOWN, VOCABULARY, Amount

#: The state of an envelope whose entries cannot be read as a record.
DAMAGED: Final = "damaged"
#: Names for many states at once.
STATES: Final[Mapping[str, frozenset[str]]] = {
    "open": OPEN,
    "ended": TERMINAL,
    **{state: frozenset({state}) for state in sorted(OPEN | TERMINAL)},
    DAMAGED: frozenset({DAMAGED}),
}
#: As amounts are compared: what is not known is less than zero, what is unlimited more than any amount.
NOT_KNOWN: Final = -1
NO_LIMIT: Final = 2**62

Sort: TypeAlias = Literal["text", "word", "time"]
Op: TypeAlias = Literal["=", "<", "<=", ">", ">="]


class Alike(Protocol):
    """What a query sees of a shape."""

    @property
    def kind(self) -> str: ...
    @property
    def operation(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def outcomes(self) -> Collection[str]: ...
    @property
    def causes(self) -> Collection[str]: ...
    @property
    def hooks(self) -> Collection[str]: ...
    @property
    def refused_by(self) -> Collection[str]: ...
    @property
    def would_refuse(self) -> Collection[str]: ...
    @property
    def codes(self) -> Collection[str]: ...
    @property
    def resources(self) -> Collection[str]: ...
    @property
    def flags(self) -> Collection[str]: ...


class Searched(Alike, Protocol):
    """What a query sees of a row."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str | None: ...
    @property
    def subject(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def project(self) -> str | None: ...
    @property
    def environment(self) -> str | None: ...
    @property
    def purpose(self) -> str | None: ...
    @property
    def owner(self) -> str | None: ...
    @property
    def part_of(self) -> str | None: ...
    @property
    def created_at(self) -> str: ...
    @property
    def ended_at(self) -> str | None: ...
    @property
    def requested(self) -> Mapping[str, Amount]: ...
    @property
    def granted(self) -> Mapping[str, Amount]: ...
    @property
    def used(self) -> Mapping[str, Amount]: ...


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the language: the attribute that holds it, whether it is of the shape, and the words that it may be.

    A *word* is compared as a whole, a *text* also by ``~``. One attribute may hold several words: any of them counts.
    """

    sort: Sort
    attribute: str
    meaning: str
    alike: bool = False
    words: Collection[str] = ()


FIELDS: Final[Mapping[str, Field]] = {
    "id": Field("text", "id", "the envelope's id"),
    "tenant": Field("text", "tenant", "the tenant of who asked"),
    "subject": Field("text", "subject", "who asked, as `type:id`"),
    "kind": Field("word", "kind", "the kind of execution", True, KINDS),
    "operation": Field("text", "operation", "the operation, such as `serving.deploy_model`", True),
    "target": Field("text", "target", "what it is about, as `type:id` or `type:id@version`"),
    "project": Field("text", "project", "the project; the workroom where no project is named"),
    "environment": Field("text", "environment", "the environment"),
    "purpose": Field("text", "purpose", "the purpose"),
    "owner": Field("text", "owner", "the component that closes it, once it is bound"),
    "part_of": Field("text", "part_of", "the id of the envelope that it is part of"),
    "state": Field("word", "state", "the state now; `open` and `ended` stand for all such states", True, STATES),
    "outcome": Field("word", "outcomes", "a difference of given from asked has this outcome", True, get_args(Outcome)),
    "cause": Field("word", "causes", "a difference, or an effective value, has this cause", True, CAUSES),
    "hook": Field("text", "hooks", "this hook was asked, whatever it said", True),
    "refused_by": Field("text", "refused_by", "this hook denied or held, and was enforced", True),
    "would_refuse": Field("text", "would_refuse", "this hook denied or held in shadow: nothing was enforced", True),
    "code": Field("text", "codes", "a reason code of a verdict, or the code of a refusal or failure", True),
    "resource": Field("word", "resources", "this resource was requested or granted", True, VOCABULARY),
    "created": Field("time", "created_at", "when it was sealed"),
    "ended": Field("time", "ended_at", "when it ended"),
}
#: Words that stand alone, and what they say; each is the name of an attribute.
FLAGS: Final[Mapping[str, str]] = {
    "ungranted": "open or completed, and nobody ever granted anything",
    "unstated": "a difference that nobody gave a reason for",
    "violations": "granted or used beyond a bound",
    "observed": "recorded after the fact: it went past the seam",
    "undecided": "admitted while no decider covered the kind",
    "flagged": "open, and a reviewer says that somebody should look at it",
    "revoking": "to be revoked, and its owner has not confirmed it",
    "late": "something came after the end",
}
SIDES: Final[Mapping[str, str]] = {
    "requested": "what was asked for in all",
    "granted": "what was given in all",
    "used": "what was used in all",
}
_FOLD: Final = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def searchable(text: str | None) -> str:
    """A text as it is searched for and added up under: not every database keeps the character zero."""
    return "" if text is None else text.replace("\0", "\ufffd")


def folded(text: str) -> str:
    """As ``~`` compares: letters from A to Z in either case are the same, all others as they are."""
    return text.translate(_FOLD)


def coded(amount: Amount) -> int:
    """An amount as it is compared. Sums may be larger than any amount that can be written."""
    if isinstance(amount, int):
        return min(amount, NO_LIMIT - 1)
    return NOT_KNOWN if amount == UNKNOWN else NO_LIMIT


# Conditions


@dataclass(frozen=True, slots=True)
class All:
    """Every one of them."""

    of: tuple[Condition, ...]

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return all(condition.matches(row) for condition in self.of)

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        said: bool | None = True
        for condition in self.of:
            one = condition.of_shape(shape)
            if one is False:
                return False
            said = None if one is None else said
        return said


@dataclass(frozen=True, slots=True)
class Either:
    """At least one of them."""

    of: tuple[Condition, ...]

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return any(condition.matches(row) for condition in self.of)

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        said: bool | None = False
        for condition in self.of:
            one = condition.of_shape(shape)
            if one is True:
                return True
            said = None if one is None else said
        return said


@dataclass(frozen=True, slots=True)
class Not:
    """Not that."""

    of: Condition

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return not self.of.matches(row)

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        said = self.of.of_shape(shape)
        return None if said is None else not said


@dataclass(frozen=True, slots=True)
class Flagged:
    """It has the flag."""

    name: str

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return self.name in row.flags

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do."""
        return self.name in shape.flags


@dataclass(frozen=True, slots=True)
class Equal:
    """The field is, or holds, one of the values. No value and the empty text are the same."""

    field: str
    values: frozenset[str]

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return any(value in self.values for value in _values(self.field, row))

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        return any(v in self.values for v in _values(self.field, shape)) if FIELDS[self.field].alike else None


@dataclass(frozen=True, slots=True)
class Contains:
    """The field, or one that it holds, contains the text; `text` is `folded`."""

    field: str
    text: str

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return any(self.text in folded(value) for value in _values(self.field, row))

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        return any(self.text in folded(v) for v in _values(self.field, shape)) if FIELDS[self.field].alike else None


@dataclass(frozen=True, slots=True)
class Within:
    """The time is from one on and before another, in the form of `timestamp`. What has no time is in no span."""

    field: str
    start: str | None = None
    end: str | None = None

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        at = searchable(getattr(row, FIELDS[self.field].attribute))
        return at != "" and (self.start is None or at >= self.start) and (self.end is None or at < self.end)

    def of_shape(self, shape: Alike) -> bool | None:
        """It depends."""
        return None


@dataclass(frozen=True, slots=True)
class Measure:
    """One side of one resource."""

    side: str
    resource: str

    def of(self, row: Searched) -> int | None:
        """The amount as it is compared; None when it is absent."""
        amount = getattr(row, self.side).get(self.resource)
        return None if amount is None else coded(amount)

    def missing(self, shape: Alike) -> bool:
        """Whether no row of the shape has it."""
        return self.side != "used" and self.resource not in shape.resources


@dataclass(frozen=True, slots=True)
class Absent:
    """There is no such amount: nobody spoke of it."""

    measure: Measure

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        return self.measure.of(row) is None

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        return True if self.measure.missing(shape) else None


@dataclass(frozen=True, slots=True)
class Compare:
    """An amount against a number as `coded` makes it, or against another amount.

    What is absent compares with nothing. What is unknown equals only the word, and is neither more nor less. What is
    unlimited is more than any number and equals the word, or another that is unlimited.
    """

    measure: Measure
    op: Op
    bound: int | Measure

    def matches(self, row: Searched) -> bool:
        """Whether the row does."""
        one = self.measure.of(row)
        other = self.bound.of(row) if isinstance(self.bound, Measure) else self.bound
        if one is None or other is None:
            return False
        if self.op == "=" and not isinstance(self.bound, Measure):
            return one == other
        return one >= 0 and other >= 0 and _holds(one, self.op, other)

    def of_shape(self, shape: Alike) -> bool | None:
        """Whether all rows of the shape do; None when it depends."""
        missing = self.measure.missing(shape) or (isinstance(self.bound, Measure) and self.bound.missing(shape))
        return False if missing else None


Condition: TypeAlias = All | Either | Not | Flagged | Equal | Contains | Within | Absent | Compare


def _values(name: str, row: Alike) -> Iterator[str]:
    found = getattr(row, FIELDS[name].attribute)
    if found is None or isinstance(found, str):
        yield searchable(found)
    else:
        yield from map(searchable, found)


def _holds(one: int, op: Op, other: int) -> bool:
    return {"=": one == other, "<": one < other, "<=": one <= other, ">": one > other, ">=": one >= other}[op]

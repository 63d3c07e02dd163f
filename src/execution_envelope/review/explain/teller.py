"""Collects sentences in their sections, and the look at a record that all sections share. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from execution_envelope.delta import Difference
from execution_envelope.envelope import timestamp
from execution_envelope.lifecycle import Effective, Event, EventData, Granted, Late, Limit
from execution_envelope.record import WHOLE, Record
from execution_envelope.review.explain import wording
from execution_envelope.review.explain.explanation import (
    MAX_EVENTS,
    MAX_SENTENCES,
    SECTIONS,
    Explanation,
    Section,
    Sentence,
    SentenceKind,
)

F = TypeVar("F")


class Teller:
    """What all sections of an explanation need: the record, the time, and where sentences go."""

    def __init__(self, record: Record, now: datetime) -> None:
        self.record = record
        self.envelope = record.envelope
        self.now = now
        #: Computed once, and in an order that does not change by how a grant was written and stored.
        self.differences = sorted(record.differences, key=lambda one: (one.sort == "constraint", one.key))
        #: The newest grant of each part, as an event.
        standing = {id(grant) for grant in record.grants.values()}
        self.grants = [event for event in record.events if id(event.data) in standing]
        self.standing = frozenset(event.sequence for event in self.grants)
        #: The time as recorded times are written.
        self.stamp = timestamp(now)
        self._sections: dict[str, list[Sentence]] = {name: [] for name in SECTIONS}
        self._told: set[int] = set()

    def say(
        self,
        section: str,
        kind: SentenceKind,
        text: str,
        *,
        events: Iterable[Event] = (),
        keys: Iterable[str] = (),
        by: Iterable[str] = (),
        codes: Iterable[str | None] = (),
        envelope: str | None = None,
        named: bool = False,
    ) -> None:
        """Add one sentence. Its events count as told, however many of them it names.

        One that is `named` begins with a name, which is written as it is; others begin with a capital.
        """
        sequences = list(dict.fromkeys(event.sequence for event in events))
        self._told.update(sequences)
        if len(sequences) > MAX_EVENTS:
            sequences = [*sequences[: MAX_EVENTS // 2], *sequences[-MAX_EVENTS // 2 :]]
        self._sections[section].append(
            Sentence(
                kind=kind,
                text=sentence(text, named=named),
                events=tuple(sequences),
                keys=tuple(dict.fromkeys(keys)),
                by=tuple(dict.fromkeys(by)),
                codes=tuple(dict.fromkeys(code for code in codes if code)),
                envelope=envelope,
            )
        )

    def of(self, kind: type[F]) -> list[tuple[Event, F]]:
        """Events of one type with what they say, in order; not what came late."""
        return [(event, event.data) for event in self.record.events if isinstance(event.data, kind)]

    def facts(self, kind: type[F]) -> list[tuple[Event, F]]:
        """The same, with what came late."""
        found = (
            (event, event.data.fact if isinstance(event.data, Late) else event.data) for event in self.record.events
        )
        return [(event, fact) for event, fact in found if isinstance(fact, kind)]

    def silent(self, section: str) -> bool:
        """Whether nothing was said in a section."""
        return not self._sections[section]

    def told(self, event: Event) -> bool:
        """Whether a sentence stands on it."""
        return event.sequence in self._told

    def untold(self) -> list[Event]:
        """Events that no sentence stands on."""
        return [event for event in self.record.events if not self.told(event)]

    def explanation(self) -> Explanation:
        """All that was said."""
        return Explanation(
            self.record.id,
            self.record.state,
            tuple(Section(name, SECTIONS[name], _bounded(said)) for name, said in self._sections.items() if said),
        )

    # Of a difference

    def givers(self, difference: Difference) -> list[str]:
        """Who granted what the difference is about; where no grant speaks of it, everybody who granted."""
        speaking = [event for event in self.grants if _speaks(event.data, difference.key)]
        return list(dict.fromkeys(event.by for event in speaking or self.grants))

    def behind(self, difference: Difference) -> list[Event]:
        """The events that a difference stands on: effective values, limits, grants."""
        key, family = difference.key, f"{difference.sort}s"
        steps = [
            event
            for event in self.record.events
            if isinstance(event.data, Effective | Limit) and key in getattr(event.data, family)
        ]
        return [*steps, *([event for event in self.grants if _speaks(event.data, key)] or self.grants)]

    def shown(self, difference: Difference, side: Any) -> str:
        """One side of a difference."""
        if difference.sort == "constraint":
            return wording.value(difference.key, side)
        return wording.amount(difference.key, side) + wording.each(difference.per)


def _speaks(data: EventData, key: str) -> bool:
    return isinstance(data, Granted) and (
        key in data.resources or key in data.constraints or key in data.because or key in data.honoured
    )


def sentence(text: str, *, named: bool = False) -> str:
    """With a full stop, and with a capital unless it begins with a name."""
    return f"{text if named else text[:1].upper() + text[1:]}."


def path(difference: Difference) -> str:
    """``resources.gpu``."""
    return f"{difference.sort}s.{difference.key}"


def keys_of(fact: Effective | Granted | Limit) -> list[str]:
    """The paths of what a fact speaks of."""
    return [
        *(f"resources.{key}" for key in sorted(fact.resources)),
        *(f"constraints.{key}" for key in sorted(fact.constraints)),
    ]


def part_name(part: str | None) -> str:
    """How a part of an execution is called."""
    return "it" if part in (None, WHOLE) else f"part {wording.name(str(part))}"


def _bounded(said: Sequence[Sentence]) -> tuple[Sentence, ...]:
    if len(said) <= MAX_SENTENCES:
        return tuple(said)
    kept = said[: MAX_SENTENCES - 1]
    rest = len(said) - len(kept)
    return (*kept, Sentence(kind="more", text=f"And {rest} more sentences like these: `envelope show` has all events."))

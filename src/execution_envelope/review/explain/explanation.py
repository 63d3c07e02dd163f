"""What an explanation is made of: sections of sentences, each with the facts that it stands on."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import msgspec

#: What sort of thing a sentence says.
SentenceKind: TypeAlias = Literal[
    "state",
    "asker",
    "ask",
    "client_default",
    "scope",
    "verdict",
    "decision",
    "approval",
    "limit",
    "effective",
    "budget",
    "hold",
    "waiting",
    "attempt",
    "grant",
    "equal",
    "difference",
    "change",
    "used",
    "end",
    "late",
    "event",
    "obligation",
    "violation",
    "error",
    "hint",
    "redacted",
    "review",
    "revocation",
    "link",
    "unsaid",
    "more",
    "now",
]
SENTENCE_KINDS: Final[tuple[str, ...]] = get_args(SentenceKind)

#: Name of a section -> its title, in the order in which they stand.
SECTIONS: Final = {
    "short": "In short",
    "asked": "Who asked, and for what",
    "decided": "What was decided",
    "waits": "Why it waits",
    "given": "What was given, and why it differs",
    "change": "What would have to change for it to be granted in full",
    "course": "What happened",
    "ended": "How it ended",
    "noted": "What must not be overlooked",
    "related": "What belongs to it",
    "now": "How it stands now, which is not on the record",
}
#: The most sentences of one section; how many more there were is the last one then.
MAX_SENTENCES: Final = 100
#: The most events that one sentence names; of more the first and the last.
MAX_EVENTS: Final = 50


class Sentence(msgspec.Struct, frozen=True, kw_only=True):
    """One sentence of plain text on one line, and what it stands on.

    `events` are sequences of the record; none where it stands on the sealed part. `keys` are paths such as
    ``resources.gpu`` and ``constraints.engine``, `by` the components, hooks or approvers that said so, `codes` causes
    and reason codes, `envelope` the id of another one that it speaks of.
    """

    kind: SentenceKind
    text: str
    events: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    envelope: str | None = None


class Section(msgspec.Struct, frozen=True):
    """Sentences that belong together; `name` is one of `SECTIONS`."""

    name: str
    title: str
    sentences: tuple[Sentence, ...]


class Explanation(msgspec.Struct, frozen=True):
    """What a record says, for people. `state` is that of the record; sections without a sentence are left out."""

    envelope: str
    state: str
    sections: tuple[Section, ...]

    def section(self, name: str) -> tuple[Sentence, ...]:
        """The sentences of one section; none when it is not there."""
        return next((section.sentences for section in self.sections if section.name == name), ())

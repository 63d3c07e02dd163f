"""A policy that is tried out: what takes the place of one hook when what was asked is decided again. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import msgspec

from execution_envelope import answers
from execution_envelope.answers import Answer
from execution_envelope.credentials import shown
from execution_envelope.decision import Decider, Decision, Declaration
from execution_envelope.envelope import KINDS, Envelope
from execution_envelope.errors import InvalidField

Language: TypeAlias = Literal["policy", "cedar"]
LANGUAGES: Final[tuple[str, ...]] = get_args(Language)
#: The hook that a policy file is registered as where nothing else is said.
HOOK: Final = "policy"
#: How many different answers are remembered.
_MAX_ANSWERS: Final = 16_384
#: What rules are matched by -> where that is in the view; of other fields no credential could be taken out.
_MATCHED: Final[Mapping[str, tuple[str, ...]]] = {
    "tenants": ("identity", "tenant"),
    "targets": ("execution", "target", "id"),
    **{f"{name}s": ("scope", name) for name in ("project", "workroom", "environment", "purpose", "classification")},
}


class Source(msgspec.Struct, frozen=True):
    """A policy as it is written, and as what it is tried out: all that another process needs to make a `Candidate`.

    It takes the place of the hook of this name. `kinds` are those that its decider is declared for; None where that is
    not known: it is asked about all of them then, and where the hook was not asked, and it has no opinion, it is left
    out.
    """

    text: bytes
    language: Language = "policy"
    hook: str = HOOK
    kinds: tuple[str, ...] | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that decides, and takes the place of a hook. `decide` is pure: the same of the same envelope.

    `refusing` says of each of its rules, by name, what it does when it is violated, None where that is not known;
    `budgeted` are the kinds that a budget beside it covers; `reads` the paths in the view that it may read, None for
    any.
    """

    declaration: Declaration
    decide: Callable[[Envelope], Decision]
    revision: str
    refusing: Mapping[str, str] | None = None
    budgeted: frozenset[str] = frozenset()
    reads: frozenset[tuple[str, ...]] | None = None

    @classmethod
    def of(cls, source: Source) -> Candidate:
        """Raises `InvalidField` with the path of what is wrong in the policy, and for a kind that there is not."""
        declared = Declaration(
            name=source.hook,
            kinds=None if source.kinds is None else frozenset(source.kinds),
            side_effects=False,
            inline=True,
        )
        declared.check()
        if source.language not in LANGUAGES:
            raise InvalidField("language", f"expected {', '.join(LANGUAGES)}, got {shown(source.language)}")
        # Each language comes with an extra of its own.
        if source.language == "cedar":
            from execution_envelope.policy.cedar import Cedar

            try:
                text = source.text.decode("utf-8")
            except UnicodeDecodeError:
                raise InvalidField("policy", "expected text in UTF-8") from None
            cedar = Cedar(text)
            return cls(declared, cedar.decide, cedar.revision)
        from execution_envelope.policy.file import parse
        from execution_envelope.policy.remembered import Remembered

        policy = parse(source.text)
        rules = policy.rules.rules
        matched = {_MATCHED[name] for rule in rules for name in rule.match if name in _MATCHED}
        budgeted: set[str] = set()
        for budget in policy.budgets.budgets:
            budgeted.update(KINDS if budget.kinds is None else budget.kinds)
        return cls(
            declared,
            Remembered(policy.rules).decide,
            policy.revision,
            {rule.name: rule.action for rule in rules},
            frozenset(budgeted),
            frozenset(matched).union(*(rule.reads for rule in rules)),
        )

    @classmethod
    def of_decider(cls, decider: Decider, *, revision: str = "") -> Candidate:
        """Of anything that decides at once, and the same of the same envelope. In this process only."""

        def decide(envelope: Envelope) -> Decision:
            said = decider.decide(envelope)
            if isinstance(said, Decision):
                return said
            if hasattr(said, "close"):
                said.close()
            raise InvalidField("hooks", "expected a decider that is not async")

        return cls(decider.declaration, decide, revision)

    def asked(self, kind: str) -> bool:
        """Whether it is asked about a kind."""
        return self.declaration.covers(kind, "admit")

    def reads_any(self, redacted: Iterable[str]) -> bool:
        """Whether it may read any of these paths, at which a credential was taken out."""
        return any(self._reads(path) for path in redacted)

    def _reads(self, path: str) -> bool:
        if path.startswith("request."):
            return False  # of the request only a digest was sealed
        if self.reads is None or path.startswith("..."):
            return True
        for short, whole in (("constraints.", "requested.constraints."), ("facets.", "correlation.facets.")):
            if path.startswith(short):
                path = f"{whole}{path.removeprefix(short)}"
        for read in self.reads:
            # A name may have dots in it: text is compared.
            at = ".".join(name for name in read if name)
            if f"{path}.".startswith(f"{at}.") or f"{at}.".startswith(f"{path}."):
                return True
        return False


class Asked:
    """Asks a candidate as a hook is asked, and remembers how answers are understood."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        #: By the id of a decision, which is kept so that it stays its own.
        self._understood: dict[int, tuple[Decision, Answer]] = {}

    def __call__(self, envelope: Envelope) -> Answer:
        """What it answers, whatever it does; the same object for the same decision."""
        declared = self._candidate.declaration
        try:
            said = self._candidate.decide(envelope)
        except Exception as error:
            return answers.failed(declared, "error", answers.raised(error), (), shadow=False, start=0.0)
        known = self._understood.get(id(said))
        if known is None:
            known = said, answers.understood(declared, said, (), shadow=False, start=0.0)
            if len(self._understood) >= _MAX_ANSWERS:
                self._understood.clear()
            self._understood[id(said)] = known
        return known[1]

"""Reviewers: what they are, what they say of live executions, and how an owner answers who asks it to revoke one.

Nothing here reads or writes a record; `reviewing` does. A verdict ends nothing: *revoke* is a request to the owning
backend, and *revoked* is only what that confirms.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias, get_args

from execution_envelope.answers import MAX_SAID
from execution_envelope.credentials import invalid, scrub, shown
from execution_envelope.decision import CODES, Decider, holding
from execution_envelope.envelope import KINDS, Ask, Subject, Target, established
from execution_envelope.errors import InvalidField, NotLive
from execution_envelope.grant import label
from execution_envelope.hooks import HookChain
from execution_envelope.lifecycle import Approval, Error, Event, Review, Revocation
from execution_envelope.record import Record

#: The operation of a request to revoke a live execution; of kind `maintenance`.
OPERATION: Final = "envelope.revoke"
#: How long an owner may take to stop an execution, in seconds. No answer is *unknown*: it is asked again.
REVOKE_TIMEOUT: Final = 30.0
#: Of how many answers of owners, to requests to revoke one execution, the text is recorded; then whether they refuse.
MAX_REVOCATIONS: Final = 32
#: States of an execution that may be revoked.
LIVE: Final = frozenset({"admitted", "granted"})
#: How the reviewer is named that asks to revoke what is part of an execution that is to be revoked.
PART_OF: Final = "part_of:"

Opinion: TypeAlias = Literal["keep", "flag", "revoke"]
OPINIONS: Final[tuple[str, ...]] = get_args(Opinion)


# What reviewers are and say


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewerDeclaration:
    """What a reviewer says of itself. `name` is without `:`, which names of people have; `kinds` are those it covers,
    None for all; `timeout` bounds it for each execution, in seconds.

    There is no failure mode: a review that failed says nothing, neither *keep* nor anything else, and that is recorded.
    """

    name: str
    version: str = "1"
    kinds: frozenset[str] | None = None
    timeout: float = 5.0

    def check(self) -> None:
        """Raises `InvalidField` naming what is declared wrongly."""
        if not isinstance(self.name, str) or not self.name or ":" in self.name:
            raise invalid("reviewers", f"expected a reviewer with a name without `:`, got {shown(self.name)}")
        label(self.name, "reviewers.name")
        path = f"reviewers.{self.name}"
        if not isinstance(self.version, str):
            raise invalid(f"{path}.version", f"expected text, got {shown(self.version)}")
        if self.kinds is not None and not (isinstance(self.kinds, Set) and self.kinds <= set(KINDS)):
            raise invalid(f"{path}.kinds", f"expected a set of {', '.join(KINDS)}, got {shown(self.kinds)}")
        if not (isinstance(self.timeout, int | float) and self.timeout > 0):
            raise invalid(f"{path}.timeout", f"expected more than 0 seconds, got {shown(self.timeout)}")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reviewer says: *keep*, *flag* or *revoke*. With the last two comes a `code` of the reason codes.

    `revision` is that of the policy it judged by, `policies` what in it determined the verdict.
    """

    verdict: Opinion
    code: str | None = None
    text: str | None = None
    revision: str | None = None
    policies: tuple[str, ...] = ()

    @classmethod
    def keep(cls, text: str | None = None) -> Finding:
        """It may go on. Takes back what the same reviewer said before, unless that is confirmed."""
        return cls("keep", text=text)

    @classmethod
    def flag(cls, code: str, text: str) -> Finding:
        """Somebody should look at it."""
        return cls("flag", code, text)

    @classmethod
    def revoke(cls, code: str, text: str) -> Finding:
        """Its owner should take it away."""
        return cls("revoke", code, text)


class Reviewer(Protocol):
    """Says whether a live execution may go on. `review` may be async; else it runs in a thread. It sees a copy."""

    @property
    def declaration(self) -> ReviewerDeclaration: ...
    def review(self, record: Record) -> Finding | Awaitable[Finding]: ...


def understood(declared: ReviewerDeclaration, said: object) -> Review:
    """What a reviewer said, as it is recorded. Raises `InvalidField` for what makes no sense."""
    if not isinstance(said, Finding):
        raise invalid("review", f"expected a Finding, got {shown(said)}")
    if said.verdict not in OPINIONS:
        raise invalid("review.verdict", f"expected {', '.join(OPINIONS)}, got {shown(said.verdict)}")
    if said.code not in CODES and (said.code is not None or said.verdict != "keep"):
        raise invalid("review.code", f"expected a reason code, got {shown(said.code)}")
    for name, text in (("text", said.text), ("revision", said.revision)):
        if text is not None and not isinstance(text, str):
            raise invalid(f"review.{name}", f"expected text, got {shown(text)}")
    policies = [scrub(str(name)) for name in said.policies]
    if len(policies) > MAX_SAID:
        policies = [*policies[: MAX_SAID - 1], f"and {len(policies) - MAX_SAID + 1} more"]
    return Review(
        label(declared.name, "reviewers.name"),
        scrub(declared.version),
        said.verdict,
        said.code,
        None if said.text is None else scrub(said.text),
        None if said.revision is None else scrub(said.revision),
        tuple(policies),
    )


class PolicyReviewer:
    """A reviewer from any decider: what it would not admit any more is flagged, or, with `verdict` *revoke*, revoked.

    ``PolicyReviewer(policy.decider, verdict="revoke")``. It says what the decider says now of what was sealed, with
    the revision of its policy. A denial is `verdict`; *flag* does not take back a *revoke* of the same decider that
    stands. What it would hold is flagged in either case, unless the same grounds were approved. A decider in shadow
    flags at most. One that abstains refuses nothing, which is *keep*; one that failed has said nothing. Limits and
    budgets are not looked at: they bound what is granted, and that is checked where it is granted.

    Raises `InvalidField` for a decider that is declared wrongly. Without `kinds` it covers those of the decider, but
    *maintenance* only when that names it.
    """

    def __init__(
        self,
        decider: Decider,
        *,
        verdict: Literal["flag", "revoke"] = "flag",
        kinds: frozenset[str] | None = None,
        timeout: float = 5.0,
    ) -> None:
        if verdict not in ("flag", "revoke"):
            raise InvalidField("verdict", f"expected `flag` or `revoke`, got {shown(verdict)}")
        self._chain = HookChain([decider], deadline=timeout)
        self._verdict: Literal["flag", "revoke"] = verdict
        self._phase: Literal["admit", "readmit"] = "admit" if "admit" in decider.declaration.phases else "readmit"
        self.declaration = ReviewerDeclaration(
            name=decider.declaration.name.replace(":", " "),
            version=decider.declaration.version,
            kinds=kinds or decider.declaration.kinds or frozenset(KINDS) - {"maintenance"},
            timeout=timeout + 1.0,  # so that what is recorded is how the decider failed
        )
        self.declaration.check()

    async def review(self, record: Record) -> Finding:
        """What the policy says of it now. Raises `RuntimeError` when the decider failed."""
        decided = await self._chain.decide(record.envelope, phase=self._phase)
        if not decided.verdicts:
            return Finding.keep()
        [said] = decided.verdicts
        if said.failure is not None:
            raise RuntimeError(f"{said.failure}: {said.message}")
        event = record.approval
        approval = None if event is None else event.data
        approved = approval.holds if isinstance(approval, Approval) and approval.decision == "approve" else {}
        verdict: Opinion = "keep"
        if said.decision == "deny":
            verdict = "flag" if said.shadow else "revoke" if self._stands(record) else self._verdict
        elif holding([said], approved):
            verdict = "flag"
        code = None if verdict == "keep" else said.code or "policy"
        return Finding(verdict, code, said.message, said.revision, said.policies)

    def _stands(self, record: Record) -> bool:
        """Whether the same reviewer, here or in another process, asked to revoke it, and has not taken that back."""
        before = record.reviews.get(self.declaration.name)
        return before is not None and isinstance(before.data, Review) and before.data.verdict == "revoke"


# What is on a record


def is_news(record: Record, fact: Review | Revocation | Error) -> bool:
    """Whether it says more than what is on the record: no change, no event."""
    if isinstance(fact, Error):
        return not any(isinstance(e.data, Error) and e.data.hook == fact.hook for e in record.events)
    if isinstance(fact, Review):
        before = record.reviews.get(fact.reviewer)
        return before is None or not isinstance(before.data, Review) or _gist(before.data) != _gist(fact)
    request = record.revoking
    since = 0 if request is None else request.sequence
    answers = [e.data for e in record.events if isinstance(e.data, Revocation) and e.sequence > since]
    if not answers:
        return True
    last = answers[-1]
    return last != fact and (len(answers) < MAX_REVOCATIONS or (last.owner, last.answer) != (fact.owner, fact.answer))


def _gist(review: Review) -> tuple[object, ...]:
    """In whatever words."""
    return review.version, review.verdict, review.code, review.revision, review.policies


def why(request: Event) -> str:
    """Who wants it revoked and why, in a sentence without a full stop."""
    said = request.data
    assert isinstance(said, Review)
    reason = said.text or said.code
    return f"revoked by {said.reviewer}" + (f": {reason}" if reason else "")


def of_parent(parent: Record, request: Event) -> Review:
    """The request to revoke what is part of an execution that is to be revoked."""
    said = request.data
    assert isinstance(said, Review)
    text = scrub(f"part of {parent.id}, which is to be {why(request)}")
    return Review(f"{PART_OF}{parent.id}", "1", "revoke", said.code, text, said.revision)


# Who revokes, and what the owner answers


def check_live(record: Record) -> None:
    """Raises `NotLive` for what cannot be revoked."""
    if record.state == "held":
        problem = f"expected a live execution, {record.id} is held: refuse it with `envelope deny {record.id}`"
        raise NotLive(problem, envelope_id=record.id)
    if record.state not in LIVE:
        raise NotLive(f"expected a live execution, {record.id} is {record.state}", envelope_id=record.id)


def request(live: Record, by: Subject, reason: str) -> Ask:
    """The request of a person to revoke a live execution, under the scope of that.

    Raises `NotLive`, and `InvalidField` for a reason that says nothing.
    """
    check_live(live)
    if not isinstance(reason, str) or not reason.strip():
        raise InvalidField("reason", f"expected a reason, got {shown(reason)}")
    scope, execution = live.envelope.scope, live.envelope.execution
    names = ("project", "workroom", "environment", "purpose", "classification", "regions", "priority")
    of_the_live = {name: value for name in names if (value := getattr(scope, name)) is not None}
    by_it = "the live execution"
    return Ask(
        kind="maintenance",
        operation=OPERATION,
        target=Target("envelope", live.id, "revoke"),
        subject=by,
        scope={
            **{name: established(value.value, by=by_it) for name, value in of_the_live.items()},
            "hints": {
                "live_tenant": established(live.envelope.identity.tenant or "", by=by_it),
                "live_kind": established(execution.kind, by=by_it),
                "live_operation": established(execution.operation, by=by_it),
                "reason": reason,
            },
        },
        entrypoint="revoke",
    )


@dataclass(frozen=True, slots=True)
class Stop:
    """What an owner answers who was asked to take an execution away, with what it saw, or why not."""

    status: Literal["stopped", "refused", "unknown"]
    text: str

    @classmethod
    def stopped(cls, evidence: str) -> Stop:
        """It does not run any more, and holds nothing; also when it had ended before. It is recorded as revoked."""
        return cls("stopped", evidence)

    @classmethod
    def refused(cls, reason: str) -> Stop:
        """The owner does not stop it. It is asked again."""
        return cls("refused", reason)

    @classmethod
    def unknown(cls, reason: str) -> Stop:
        """It cannot be found out now whether it was stopped. It is asked again."""
        return cls("unknown", reason)


#: Asks the owner of an execution to take it away, and says why. It is called again until it confirms, by several
#: processes perhaps: stopping what has been stopped is *stopped*.
Revoker: TypeAlias = Callable[[Record, str], Awaitable[Stop]]
Revokers: TypeAlias = Mapping[str, Revoker]


# What rounds found


@dataclass(frozen=True, slots=True)
class Reviewed:
    """What one reviewer said of one execution, or how it *failed*; `news` where that was recorded."""

    envelope: str
    reviewer: str
    verdict: Literal["keep", "flag", "revoke", "failed"]
    text: str | None
    news: bool


@dataclass(slots=True)
class ReviewRound:
    """What a round of reviews found. `found` has all but what may go on as before: that is counted as `kept`.

    `left_out` counts what reviewers were not asked, because they did not answer before; `unreadable` are the ids of
    envelopes that cannot be read.
    """

    looked_at: int = 0
    kept: int = 0
    recorded: int = 0
    left_out: int = 0
    found: list[Reviewed] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def ids(self, verdict: Literal["keep", "flag", "revoke", "failed"]) -> list[str]:
        return list(dict.fromkeys(one.envelope for one in self.found if one.verdict == verdict))


@dataclass(slots=True)
class Carried:
    """What became of those that were to be revoked: (id, what the owner said). `ended` are those that came to another
    end meanwhile, (id, state); `unreadable` cannot be read."""

    revoked: list[tuple[str, str]] = field(default_factory=list)
    unconfirmed: list[tuple[str, Stop]] = field(default_factory=list)
    ended: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

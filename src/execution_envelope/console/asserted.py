"""What a service says through the HTTP API, checked before it is stored: it is not trusted as our own code is.

Pure but for the `read` that it is given. What is checked: that the sealed bytes are an envelope in canonical form, and
the digests are theirs; that facts follow the table of transitions on what is stored; that the envelope is of one of the
service's tenants and is its own; that nobody gives back more of a budget than the envelope holds; that who approves or
revokes was admitted to. What is not: whether
a decider was asked - a service that seals decides itself, and its chain says so. Who is to be decided about by the
server admits through it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from execution_envelope import approvals, credentials, reviewer
from execution_envelope.budgets import entries_of, quoted
from execution_envelope.envelope import KINDS, MAX_ENTRIES, MAX_REDACTED, Envelope, canonical, key_digest, sha256
from execution_envelope.envelope import Subject as Asking
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Exported, IllegalTransition, InvalidField
from execution_envelope.grant import label
from execution_envelope.ledger import wire
from execution_envelope.ledger.commit import DAMAGED, Commit, SequenceConflict, Stored
from execution_envelope.ledger.submission import settled
from execution_envelope.lifecycle import (
    ASKED,
    Admitted,
    Approval,
    Bound,
    Budgeted,
    Event,
    EventData,
    Late,
    Review,
    Revoked,
    Sealed,
)
from execution_envelope.record import Record, check
from execution_envelope.resources import VOCABULARY

#: Bytes of one sealed envelope, and of the facts of one commit, at most; and how deep they may be.
MAX_SEALED: Final = 2**20
MAX_FACTS: Final = 2**20
MAX_DEPTH: Final = 32
#: Facts of one commit at most.
MAX_COUNT: Final = 1000

_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_CUT: Final = re.compile(r"\.\.\. \[cut: \d+ characters, sha256 [0-9a-f]{64}\]\Z")
_KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")


@dataclass(frozen=True, slots=True)
class Service:
    """A backend service that writes: its name, which stands before the names of its components, and its tenants.

    None is every tenant, and envelopes without one.
    """

    name: str
    tenants: frozenset[str] | None

    def sees(self, envelope: Envelope) -> bool:
        """Whether it is of one of the service's tenants."""
        return self.tenants is None or envelope.identity.tenant in self.tenants

    def owns(self, stored: Stored) -> bool:
        """Whether the service recorded the envelope, or is the owner that it was bound to."""
        if self.names(stored.events[0].by):
            return True
        return any(isinstance(event.data, Bound) and event.data.owner == self.name for event in stored.events)

    def names(self, by: str) -> bool:
        """Whether a component is one of its own."""
        return by == self.name or by.startswith(f"{self.name}/")

    def keeps(self, account: str) -> bool:
        """Whether an account of a budget may be entered: one that may be seen, or one of everybody together."""
        return self.shows(account) or "/" not in account

    def shows(self, account: str) -> bool:
        """Whether an account of a budget may be seen: one for a tenant of its own, named first, because further behind
        a project may have the name of a tenant."""
        return self.tenants is None or account.split("/")[1:2] in [[quoted(tenant)] for tenant in self.tenants]


class Assertions:
    """Checks the submissions of one group in their order; each is seen by those behind it."""

    def __init__(self, service: Service, read: Callable[[str], Stored | None]) -> None:
        self._service = service
        self._read = read
        self._stored: dict[str, Stored | None] = {}
        #: The same with what the submissions before would add.
        self._ahead: dict[str, Stored] = {}

    def checked(self, said: wire.SentSubmission) -> list[Commit]:
        """The commits as they may be stored. Raises `InvalidField`, `IllegalTransition`, `SequenceConflict` where they
        cannot be, and what reading raises."""
        commits = [self._commit(commit) for commit in said.commits]
        if len({commit.envelope for commit in commits}) < len(commits):
            raise SequenceConflict
        for place, commit in enumerate(commits):
            stored = self._standing(commit.envelope)
            if commit.sealed is not None:
                # Whether it is there already, who stores it finds out.
                check(ASKED, commit.facts)
                self._check_budgets(commit, ())
                self._check_said_for(commit, None)
                continue
            if stored is None:
                raise SequenceConflict
            self._check_owner(stored)
            fitting = self._fitting(commit)
            if fitting is None:
                doubtful = said.doubtful and commit.sequence < len(stored.events)
                if not (doubtful or said.relaxed):
                    raise SequenceConflict
                behind = settled([commit], self._standing, again=doubtful)
                if not behind:
                    continue  # it is stored already, and who stores finds that too
                [commit] = behind
                if not doubtful:  # else who stores looks at the place that it named
                    commits[place] = commit
                fitting = stored
            try:
                check(check(ASKED, (event.data for event in fitting.events)), commit.facts)
            except IllegalTransition as illegal:
                if said.relaxed or said.doubtful:
                    raise SequenceConflict from illegal  # as where it comes behind what others recorded
                raise
            self._check_budgets(commit, fitting.events)
            self._check_said_for(commit, fitting)
        for commit in commits:
            self._add(commit)
        return commits

    def _fitting(self, commit: Commit) -> Stored | None:
        """What the commit follows on: what is stored, or what that will be with the submissions before."""
        for stored in (self._ahead.get(commit.envelope), self._stored.get(commit.envelope)):
            if stored is not None and len(stored.events) == commit.sequence:
                return stored
        return None

    def _add(self, commit: Commit) -> None:
        before = self._fitting(commit)
        if commit.sealed is not None:
            if self._stored[commit.envelope] is None:
                self._ahead[commit.envelope] = Stored(commit.sealed.body, tuple(commit.events()))
        elif before is not None:
            self._ahead[commit.envelope] = Stored(before.body, (*before.events, *commit.events()))

    def _standing(self, envelope: str) -> Stored | None:
        if envelope not in self._stored:
            self._stored[envelope] = self._read(envelope)
        return self._ahead.get(envelope) or self._stored[envelope]

    def _check_owner(self, stored: Stored) -> None:
        if not self._service.sees(_envelope(stored.body)):
            raise SequenceConflict  # as of one that is not there: nobody is told what others run
        if not self._service.owns(stored):
            problem = f"expected an envelope that {self._service.name} recorded or owns, another service did"
            raise InvalidField("envelope", problem)

    # One commit

    def _commit(self, said: wire.SentCommit) -> Commit:
        """It alone: its form, its names, what is sealed."""
        if not _ID.fullmatch(said.envelope):
            raise InvalidField("envelope", "expected the id of an envelope, a UUID of version 7 in lower case")
        if not 0 <= said.sequence < 2**31:
            raise InvalidField("sequence", f"expected a place in the order of events, got {said.sequence}")
        if not _TIME.fullmatch(said.at):
            raise InvalidField("at", "expected RFC 3339 in UTC with microseconds")
        if not said.by:
            raise InvalidField("by", "expected the component that says so, got an empty name")
        if not 1 <= len(said.facts) <= MAX_COUNT:
            raise InvalidField("facts", f"expected 1 to {MAX_COUNT} facts, got {len(said.facts)}")
        _check_plain(canonical(said.facts), "facts", MAX_FACTS)
        try:
            commit = wire.received(said, label(wire.named(self._service.name, said.by), "by"))
        except msgspec.MsgspecError as error:
            raise InvalidField("sealed", f"expected an envelope: {credentials.brief(str(error), 200)}") from None
        seals = [place for place, fact in enumerate(said.facts) if isinstance(_fact(fact), Sealed)]
        if commit.sealed is None:
            if seals:
                raise InvalidField("sealed", "expected the envelope with the fact that it was sealed, got none")
            return commit
        first = said.facts[0]
        if said.sequence != 0 or seals != [0] or not isinstance(first, Sealed):
            raise InvalidField("facts", "expected the fact that it was sealed at first, and once")
        self._check_sealed(said, first)
        return commit

    def _check_sealed(self, said: wire.SentCommit, first: Sealed) -> None:
        assert said.sealed is not None
        body = said.sealed.encode()
        _check_plain(body, "sealed", MAX_SEALED)
        envelope = decode_envelope(body)
        if canonical(envelope) != body:
            raise InvalidField("sealed", "expected the canonical form of an envelope")
        if first.digest != sha256(body):
            raise InvalidField("facts.sealed.digest", "expected the digest of the sealed bytes")
        if envelope.id != said.envelope:
            raise InvalidField("sealed", "expected the id that the commit names")
        same = [canonical(envelope.execution), canonical(envelope.scope), canonical(envelope.requested)]
        if first.request != sha256(b"[%b,%b,%b]" % (same[0], same[1], same[2])):
            raise InvalidField("facts.sealed.request", "expected the digest of execution, scope and requested")
        if len(first.redacted) > MAX_REDACTED:
            raise InvalidField("facts.sealed.redacted", f"expected up to {MAX_REDACTED} paths")
        _check_key(envelope, first)
        _check_form(envelope)
        if not self._service.sees(envelope):
            problem = f"expected a tenant of the service {self._service.name}, this one is not"
            raise InvalidField("sealed.identity.tenant", problem)
        for link in ("part_of", "supersedes"):
            self._check_link(envelope, link)

    def _check_link(self, envelope: Envelope, link: str) -> None:
        """Another tenant's envelope is said not to exist: a link must not tell what others run."""
        id = getattr(envelope.correlation, link)
        if id is None:
            return
        try:
            linked = self._standing(id)
        except Exported:
            linked = None
        if linked is not None and _envelope(linked.body).identity.tenant != envelope.identity.tenant:
            raise InvalidField(f"sealed.correlation.{link}", "expected an envelope, none has this id")

    def _check_said_for(self, commit: Commit, stored: Stored | None) -> None:
        """What a person said of an envelope stands on a request of that person's, which this service recorded; and
        what ends because it was revoked, was to be revoked."""
        said = [fact for fact in map(_fact, commit.facts) if isinstance(fact, Approval | Review | Revoked)]
        if not said:
            return
        if stored is None:
            problem = "expected an approval, a review or a revocation of what is recorded already"
            raise InvalidField(f"facts.{said[0].__struct_config__.tag}", problem)
        record = stored.record()
        for fact in said:
            match fact:
                case Approval():
                    asked = self._request_of(record, fact.admission, approvals.OPERATION, fact.decision)
                    if asked is None or fact.approver != _person(asked):
                        problem = "expected the request of the approver, to say this of the envelope"
                        raise InvalidField("facts.approval.admission", problem)
                    if approvals.is_same(record.envelope.identity, asked.identity):
                        raise InvalidField("facts.approval.approver", "expected another than who asked for it")
                case Review(admission=str(admission)):
                    asked = self._request_of(record, admission, reviewer.OPERATION, fact.verdict)
                    if asked is None or fact.reviewer != _person(asked):
                        problem = "expected the request of the reviewer, to say this of the envelope"
                        raise InvalidField("facts.review.admission", problem)
                case Review() if ":" in fact.reviewer and not fact.reviewer.startswith(reviewer.PART_OF):
                    problem = "expected the name of a reviewer, or the request of the person who says it"
                    raise InvalidField("facts.review.reviewer", problem)
                case Revoked():
                    asks = any(isinstance(one, Review) and one.verdict == "revoke" for one in said)
                    if not record.was_to_be_revoked and not asks:
                        raise InvalidField("facts.revoked", "expected a review that asked for it, there is none")

    def _request_of(self, record: Record, admission: str, operation: str, said: str) -> Envelope | None:
        """The request to say something of an envelope, when it was admitted; None where there is no such."""
        try:
            stored = self._standing(admission) if _ID.fullmatch(admission) else None
        except Exported:
            return None
        if stored is None or not self._service.owns(stored):
            return None
        asked = _envelope(stored.body)
        execution, target = asked.execution, asked.execution.target
        about = (target.type, target.id, target.version) == ("envelope", record.id, said)
        admitted = any(isinstance(event.data, Admitted) for event in stored.events)
        if execution.kind == "maintenance" and execution.operation == operation and about and admitted:
            return asked
        return None

    def _check_budgets(self, commit: Commit, events: Sequence[Event]) -> None:
        """Of budgets nothing is given back that is not held, and nothing reserved without looking for room."""
        if not commit.budgeted:
            return
        held: Counter[tuple[str, str, str, str]] = Counter()
        for fact in (*(event.data for event in events), *commit.facts):
            for entry in entries_of(fact):
                for side in ("reserved", "spent", "unknown"):
                    held[entry.account, entry.window, entry.resource, side] += getattr(entry, side)
        if any(total < 0 for total in held.values()):
            raise InvalidField("budget", "expected to give back what the envelope holds, got more than that")
        for fact in commit.facts:
            for entry in entries_of(fact):
                if not self._service.keeps(entry.account):
                    raise InvalidField("budget", f"expected an account of the service's tenants, got {entry.account}")
            bare = isinstance(fact, Budgeted) and fact.action == "reserve"
            if bare and any(
                not e.shadow and e.reserved > 0 and e.account not in commit.within for e in entries_of(fact)
            ):
                raise InvalidField("budget", "expected what is reserved to have room in its account")


def _fact(data: EventData) -> EventData:
    return data.fact if isinstance(data, Late) else data


def _person(asked: Envelope) -> str:
    subject = asked.identity.subject
    return credentials.scrub(f"{subject.type}:{subject.id}")


def _envelope(body: bytes) -> Envelope:
    try:
        return decode_envelope(body)
    except DAMAGED as error:
        raise IllegalTransition("expected a readable envelope", state="damaged", event="") from error


def _check_key(envelope: Envelope, first: Sealed) -> None:
    """The digest is of the key that is sealed, in its scope; of one that is long, or holds a credential, a part is."""
    asking, key = envelope.identity, envelope.correlation.idempotency_key
    if first.key is None:
        if key is not None:
            raise InvalidField("facts.sealed.key", "expected the digest of the idempotency key, got none")
        return
    subject = Asking(asking.subject.type, asking.subject.id, tenant=asking.tenant)
    # One that is held without a key gets its id for one.
    expected = key_digest(subject, envelope.execution.operation, envelope.id if key is None else key)
    whole = key is None or not (credentials.contains(key) or _CUT.search(key))
    if first.key != expected and whole:
        raise InvalidField("facts.sealed.key", "expected the digest of the idempotency key in its scope")


def _check_form(envelope: Envelope) -> None:
    """What sealing bounds, see `envelope.seal`."""
    identity, scope, requested = envelope.identity, envelope.scope, envelope.requested
    counts: dict[str, Any] = {
        "roles": identity.roles,
        "delegation": identity.delegation,
        "scope.hints": scope.hints,
        "requested": requested.resources,
        "constraints": requested.constraints,
        "facets": envelope.correlation.facets,
    }
    for name, entries in counts.items():
        if len(entries) > MAX_ENTRIES[name]:
            raise InvalidField(f"sealed.{name}", f"expected up to {MAX_ENTRIES[name]} entries, got {len(entries)}")
    for name in (*scope.hints, *requested.constraints, *envelope.correlation.facets):
        if not _KEY.fullmatch(name):
            raise InvalidField("sealed", "expected names of up to 128 letters, digits and `_.:/-`")
    if not requested.resources.keys() <= VOCABULARY.keys():
        raise InvalidField("sealed.requested", "expected resources of the vocabulary")
    if envelope.execution.kind not in KINDS or not _TIME.fullmatch(envelope.correlation.created_at):
        raise InvalidField("sealed.correlation.created_at", "expected RFC 3339 in UTC with microseconds")


def _check_plain(body: bytes, field: str, limit: int) -> None:
    """What may be recorded of JSON text: so large, so deep, without floats and without credentials."""
    if len(body) > limit:
        raise InvalidField(field, f"expected up to {limit} bytes, got {len(body)}")
    plain = msgspec.json.decode(body)
    _check_value(plain, field, 0)
    if not credentials.clean([body.decode()]):
        found: list[str] = []
        if credentials.redact(plain, path=field, found=found.append) != plain:
            raise InvalidField(field, "expected credentials to be taken out before it is sent, one is in it")


def _check_value(value: Any, field: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidField(field, f"expected up to {MAX_DEPTH} levels")
    if isinstance(value, float):
        raise InvalidField(field, "expected whole numbers, got a fraction")
    if isinstance(value, dict):
        for item in value.values():
            _check_value(item, field, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, field, depth + 1)

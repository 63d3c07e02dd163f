"""What a replay found: counts, samples, what cannot be said, and live envelopes; as a file that pages show later.

A `Tally` is what a part of the ledger comes to. Tallies add up to the same whatever the parts were: counts are added,
and of what is only shown as an example the same few are kept, chosen by the hash of the id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from execution_envelope.credentials import cut_text
from execution_envelope.errors import InvalidField

T = TypeVar("T")

VERSION: Final = 1
#: What a decision means: shadow mode and canaries are left out, see `comparison`.
Meaning: TypeAlias = Literal["admitted", "held", "denied"]
#: Samples of each (before, after, rule), and all of them together.
MAX_SAMPLES: Final = (5, 500)
#: Live envelopes that are listed, those with the smallest ids, the oldest, first; all are counted.
MAX_LIVE: Final = 1_000
#: Ids that are kept as examples of what cannot be replayed, and of each limit that changes.
MAX_EXAMPLES: Final = 5
#: Rules, tenants, subjects, limits and obligations of each that are listed, those with most changes first.
MAX_LISTED: Final = 1_000
#: Days that are listed, the newest.
MAX_DAYS: Final = 1_100
#: Characters of a reason, and of a name, before a note that says how long it was.
MAX_TEXT: Final = 300
#: Bytes of a result that is read from a file.
MAX_BYTES: Final = 8 * 1024 * 1024

#: What cannot be replayed, or only with a reservation: name -> what that means.
CANNOT: Final[Mapping[str, str]] = {
    "damaged": "its entries cannot be read, or are not what was sealed: run `envelope verify`; not compared",
    "grants_damaged": "its limits become narrower, and what was granted cannot be read: compared without that",
    "exported": "up to so many were sealed in segments that were exported and dropped; not compared",
    "observed": "recorded after the fact: nobody decided; not compared",
    "approving": "a request to approve another one, which takes more than verdicts to admit; not compared",
    "budget_stands": "a budget denied it, and its answer stands: what the budgets of the policy that is replayed would "
    "have said depends on what was held then",
    "budget_not_asked": "admitted now and not then: no budget was asked about it, it counts as if there had been room",
    "budgets": "admitted now, and of a kind that a budget of the policy covers: whether that had room depends on what "
    "was held then, it counts as if it had",
    "other_hooks": "other hooks were asked too: what they said then stands",
    "other_failed": "another hook failed: the failure mode that was applied then stands",
    "hook_failed": "the hook that is replaced failed then, and its failure mode was applied: that may be why",
    "hook_not_asked": "the hook that is replaced was not asked then: what is replayed is added",
    "undecided": "no hook was asked, and what is replayed has no opinion: admitted undecided, as then; a decider that "
    "is declared for its kind would have it denied as undecidable, see --kind",
    "shadow": "something said then was in shadow, and not enforced: what it meant is compared, as if it were enforced",
    "held_again": "held, and asked again later: the first answer is compared",
    "approved": "held then and now, and approved then, on other grounds than those on which it is held now: whether "
    "these would be approved is not known",
    "redacted": "a credential was taken out of what a rule may read: any policy reads a marker in its place",
    "engine_errors": "a rule could not be evaluated",
}


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One envelope whose decision changes. `rule` is what the change is put down to, see `RuleChange`."""

    id: str
    at: str
    before: Meaning
    after: Meaning
    kind: str
    operation: str
    subject: str
    tenant: str | None = None
    rule: str | None = None
    code_before: str | None = None
    code_after: str | None = None
    reason: str | None = None


class Live(msgspec.Struct, frozen=True, omit_defaults=True):
    """An open execution that was admitted, and would not be."""

    id: str
    at: str
    after: Meaning
    kind: str
    operation: str
    subject: str
    tenant: str | None = None
    rule: str | None = None
    reason: str | None = None


class Change(msgspec.Struct, frozen=True):
    """So many decisions were `before` and are `after`."""

    before: Meaning
    after: Meaning
    count: int


class RuleChange(msgspec.Struct, frozen=True):
    """What a rule changes. One of the policy that is replayed (`of` *candidate*) refuses now; one that was recorded
    (*recorded*) refused then, and what is replayed does not. Where no rule is named, None."""

    of: Literal["candidate", "recorded"]
    rule: str | None
    before: Meaning
    after: Meaning
    count: int


class DayChange(msgspec.Struct, frozen=True):
    """The decisions of one UTC day and kind."""

    day: str
    kind: str
    before: Meaning
    after: Meaning
    count: int


class Affected(msgspec.Struct, frozen=True):
    """A tenant (None: of none), or a subject ``type:id`` of one: so many of its decisions change, of `compared`, which
    is known of tenants only."""

    tenant: str | None
    before: Meaning
    after: Meaning
    count: int
    subject: str | None = None
    compared: int | None = None


class LimitChange(msgspec.Struct, frozen=True):
    """A limit on what is admitted before and after: *lower* or *higher*, *new* or *gone*; or, of a constraint, *fewer*,
    *more* or *other* values. Of `below` more was granted than the new one allows; `examples` are ids."""

    name: str
    change: str
    count: int
    below: int
    examples: tuple[str, ...]


class DutyChange(msgspec.Struct, frozen=True):
    """An obligation of what is admitted before and after: *new*, *gone* or *changed*."""

    name: str
    change: str
    count: int


class EngineError(msgspec.Struct, frozen=True):
    """What was said of a rule that could not be evaluated, for so many envelopes."""

    text: str
    count: int


class Cannot(msgspec.Struct, frozen=True):
    """What cannot be replayed, or only with the reservation that `text` names: see `CANNOT`. `examples` are ids."""

    name: str
    count: int
    text: str
    examples: tuple[str, ...]


class ReplayResult(msgspec.Struct, frozen=True):
    """What would have been decided by a policy of what was asked from `since` (included) to `until` (RFC 3339).

    `envelopes` are all of that time, `compared` those of which it can be said; `changed` those whose decision changes.
    Lists are bounded, see `MAX_LISTED` and its neighbours; `left_out` says of which how many more there were.
    """

    version: Literal[1]
    at: str
    ledger: str
    hook: str
    language: str
    revision: str
    sha256: str
    kinds: tuple[str, ...] | None
    tenants: tuple[str, ...] | None
    since: str | None
    until: str
    envelopes: int
    compared: int
    changed: int
    decisions: tuple[Change, ...]
    days: tuple[DayChange, ...]
    rules: tuple[RuleChange, ...]
    tenants_affected: tuple[Affected, ...]
    subjects_affected: tuple[Affected, ...]
    samples: tuple[Sample, ...]
    limits: tuple[LimitChange, ...]
    obligations: tuple[DutyChange, ...]
    cannot: tuple[Cannot, ...]
    errors: tuple[EngineError, ...]
    live: int
    live_listed: tuple[Live, ...]
    left_out: dict[str, int]

    @property
    def changes(self) -> bool:
        """Whether anything would be otherwise: a decision, a limit or an obligation."""
        return bool(self.changed or self.limits or self.obligations)


_decode: Final = msgspec.json.Decoder(ReplayResult).decode


def encode(result: ReplayResult) -> bytes:
    """As JSON that `decode` reads."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"


def decode(body: bytes) -> ReplayResult:
    """Raises `InvalidField` for what is no result of a replay, is too long, or is of another version."""
    if len(body) > MAX_BYTES:
        raise InvalidField("replay", f"expected the result of a replay of up to {MAX_BYTES} bytes, got more")
    try:
        return _decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidField("replay", f"expected the result of a replay, version {VERSION}: {error}") from None


def hashed(id: str) -> bytes:
    """By what examples are chosen: the same of a ledger whatever parts it is read in, and spread over it."""
    return hashlib.sha256(id.encode("utf-8", "replace")).digest()


_encode_key: Final = msgspec.json.Encoder().encode
_decode_key: Final = msgspec.json.Decoder().decode


class Tally(msgspec.Struct):
    """What a part of the ledger comes to. `counts` are by JSON lists whose first element says of what."""

    envelopes: int = 0
    live: int = 0
    counts: dict[str, int] = {}
    samples: dict[str, list[Sample]] = {}
    listed: list[Live] = []
    examples: dict[str, list[str]] = {}

    def count(self, *key: str | None, times: int = 1) -> None:
        """Add to the count of this."""
        name = _encode_key(key).decode()
        self.counts[name] = self.counts.get(name, 0) + times

    def cannot(self, name: str, id: str) -> None:
        """Count what `CANNOT` names, with an example."""
        self.count("cannot", name)
        self.example(id, "cannot", name)

    def example(self, id: str, *key: str | None) -> None:
        """Keep the id as an example of what has this key, among others."""
        kept = self.examples.setdefault(_encode_key(key).decode(), [])
        # An id comes with all of its events, so no example comes twice.
        kept.append(id)
        if len(kept) > 4 * MAX_EXAMPLES:
            _trim(kept)

    def sample(self, sample: Sample) -> None:
        """Keep it among others of the same decisions and rule."""
        kept = self.samples.setdefault(_encode_key([sample.before, sample.after, sample.rule]).decode(), [])
        kept.append(sample)
        if len(kept) > 4 * MAX_SAMPLES[0]:
            _trim_samples(kept)

    def alive(self, live: Live) -> None:
        """Count it, and list it while it is among the oldest."""
        self.live += 1
        self.listed.append(live)
        if len(self.listed) > 2 * MAX_LIVE:
            self._trim_live()

    def add(self, other: Tally) -> None:
        """Another part."""
        self.envelopes += other.envelopes
        self.live += other.live
        for key, count in other.counts.items():
            self.counts[key] = self.counts.get(key, 0) + count
        for key, samples in other.samples.items():
            mine = self.samples.setdefault(key, [])
            mine += samples
            _trim_samples(mine)
        for key, ids in other.examples.items():
            kept = self.examples.setdefault(key, [])
            kept += ids
            _trim(kept)
        self.listed += other.listed
        self._trim_live()

    def trim(self) -> Tally:
        """Keep no more examples than are shown."""
        self._trim_live()
        for samples in self.samples.values():
            _trim_samples(samples)
        for ids in self.examples.values():
            _trim(ids)
        return self

    def _trim_live(self) -> None:
        self.listed.sort(key=lambda live: live.id)
        del self.listed[MAX_LIVE:]

    def of(self, name: str) -> list[tuple[list[Any], int]]:
        """Every count of this, with the rest of its key, in the order of keys."""
        found = [(_decode_key(key), count) for key, count in self.counts.items()]
        return sorted(
            ((key[1:], count) for key, count in found if key[0] == name),
            key=lambda pair: [(part is not None, part or "") for part in pair[0]],
        )

    def examples_of(self, *key: str | None) -> tuple[str, ...]:
        """The examples of what has this key."""
        return tuple(sorted(self.examples.get(_encode_key(key).decode(), ())))


def _trim(ids: list[str]) -> None:
    ids.sort(key=hashed)
    del ids[MAX_EXAMPLES:]


def _trim_samples(samples: list[Sample]) -> None:
    samples.sort(key=lambda sample: hashed(sample.id))
    del samples[MAX_SAMPLES[0] :]


def short(text: str | None) -> str | None:
    """A text of a record, or of a policy, as a result has it."""
    return None if text is None else cut_text(text, MAX_TEXT)


def _made(kind: Callable[..., T], key: Sequence[Any], **more: Any) -> T:
    return kind(*key, **more)


def lists_of(tally: Tally) -> dict[str, Any]:
    """Every field of a `ReplayResult` that follows from the tally."""
    left_out: dict[str, int] = {}

    def most(name: str, found: Sequence[Any]) -> tuple[Any, ...]:
        ordered = sorted(found, key=lambda one: -one.count)  # those of the same count in the order of their names
        if len(ordered) > MAX_LISTED:
            left_out[name] = len(ordered) - MAX_LISTED
        return tuple(ordered[:MAX_LISTED])

    decisions: dict[tuple[Any, Any], int] = {}
    days = [_made(DayChange, key, count=count) for key, count in tally.of("day")]
    for one in days:
        pair = one.before, one.after
        decisions[pair] = decisions.get(pair, 0) + one.count
    listed_days = sorted({one.day for one in days}, reverse=True)
    if len(listed_days) > MAX_DAYS:
        left_out["days"] = len(listed_days) - MAX_DAYS
        days = [one for one in days if one.day >= listed_days[MAX_DAYS - 1]]
    compared = {key[0]: count for key, count in tally.of("compared")}
    changed = [_made(Affected, key, count=count, compared=compared.get(key[0], 0)) for key, count in tally.of("tenant")]
    below = {tuple(key): count for key, count in tally.of("below")}
    cannot = {key[0]: count for key, count in tally.of("cannot")}
    samples = sorted((s for some in tally.samples.values() for s in some), key=lambda s: hashed(s.id))
    return {
        "envelopes": tally.envelopes,
        "compared": sum(decisions.values()),
        "changed": sum(count for (before, after), count in decisions.items() if before != after),
        "decisions": tuple(Change(*pair, count) for pair, count in sorted(decisions.items())),
        "days": tuple(days),
        "rules": most("rules", [_made(RuleChange, key, count=count) for key, count in tally.of("rule")]),
        "tenants_affected": most("tenants_affected", changed),
        "subjects_affected": most(
            "subjects_affected",
            [
                _made(Affected, [tenant, *pair], count=count, subject=subject)
                for (tenant, subject, *pair), count in tally.of("subject")
            ],
        ),
        "samples": tuple(sorted(samples[: MAX_SAMPLES[1]], key=lambda sample: sample.id)),
        "limits": most(
            "limits",
            [
                _made(
                    LimitChange,
                    key,
                    count=count,
                    below=below.get(tuple(key), 0),
                    examples=tally.examples_of("limit", *key),
                )
                for key, count in tally.of("limit")
            ],
        ),
        "obligations": most("obligations", [_made(DutyChange, key, count=count) for key, count in tally.of("duty")]),
        "cannot": tuple(
            Cannot(name, count, text, tally.examples_of("cannot", name))
            for name, text in CANNOT.items()
            if (count := cannot.get(name))
        ),
        "errors": most("errors", [_made(EngineError, key, count=count) for key, count in tally.of("error")]),
        "live": tally.live,
        "live_listed": tuple(tally.listed),
        "left_out": left_out,
    }
